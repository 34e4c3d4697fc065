// The fast path of a call: arguments checked, autograd recorded and the kernels called without a step in Python.
//
// It takes ordinary calls only. Whatever is out of the ordinary it declines, and Python goes its own way, which serves
// everything and holds every error message.
#pragma once

#include <torch/csrc/python_headers.h>

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

namespace rl_kernels {

// Which (op, dtype) pairs the kernels serve, as Python's selection says: an or of bits.
uint32_t serving_bit(const std::string &op, c10::ScalarType dtype);
// forced: the backend was asked for by name, so that it also takes calls on which another would do better.
// cuda: whether this is about the CUDA kernels, not those for CPUs.
void set_serving(uint32_t bits, bool forced, bool cuda);
// Declines every call from now on, backward passes included.
void set_bypassed(bool bypassed);
// The Python function that backward calls where it cannot call the kernels itself.
void set_formulas(PyObject *function);

// (x, weights, coefficients, biases) -> Tensor, or None where declined. One argument more, True, says that coefficients
// of three dimensions are Outer ones, joined; users may not pass such.
PyObject *mixed_linear_call(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
// (x, weights, coefficients, biases, spatial, stride, padding, dilation, groups) -> Tensor, or None where declined.
PyObject *mixed_conv_call(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

} // namespace rl_kernels
