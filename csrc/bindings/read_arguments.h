// Python's arguments, read in C++. Nothing is raised: what does not read as expected is declined, and Python's own way
// says what is wrong with it.
#pragma once

#include "cpu/torch/ops.h"

#include <ATen/core/Tensor.h>

#include <torch/csrc/python_headers.h>

namespace rl_kernels {

struct Call {
  at::Tensor x, coefficients;
  Tensors weights;
  Biases biases;
  Geometry geometry;   // of a convolution
  bool joined = false; // whether the coefficients are in the ops' form, as Outer ones are read only

  bool conv() const { return !geometry.stride.empty(); }
};

// (x, weights, coefficients, biases)
bool read_linear(PyObject *const *arguments, Call &call);
// (x, weights, coefficients, biases, spatial, stride, padding, dilation, groups)
bool read_conv(PyObject *const *arguments, Call &call);

} // namespace rl_kernels
