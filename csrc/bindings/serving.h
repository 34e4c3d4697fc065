// What the fast path may take, as things are set now: the calls that Python says the backend serves, in ordinary
// states, on ordinary tensors.
#pragma once

#include "cpu/torch/ops.h"

#include <ATen/core/Tensor.h>

#include <torch/csrc/python_headers.h>

namespace rl_kernels {

enum class Op { forward, dgrad, wgrad };

bool serves_anything();
bool serves(bool conv, Op op, at::ScalarType dtype);

// Whether an ordinary call is under way: no transform, mode, tracer or other observer.
bool ordinary_state();

// A dense CPU tensor and nothing else: no subclass, wrapper, lazy view or dual number.
bool plain(const at::Tensor &tensor);

// Why a call is left to another backend; nullptr where it is not. Without a geometry it is a linear layer's.
const char *why_left(const at::Tensor &activation, const Tensors &weights, const Geometry *geometry);

// The function given to set_formulas.
PyObject *formulas();

} // namespace rl_kernels
