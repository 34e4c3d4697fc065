// What the fast path may take, as things are set now: the calls that Python says the backend serves, in ordinary
// states, on ordinary tensors.
#pragma once

#include "cpu/torch/ops.h"

#include <ATen/core/Tensor.h>

#include <torch/csrc/python_headers.h>

namespace rl_kernels {

enum class Op { forward, dgrad, wgrad };

// Whose kernels take a tensor.
enum class Side { cpu, cuda };
// By its device; a CPU's tensors may pose as a GPU's.
Side side_of(const at::Tensor &tensor);

bool serves_anything();
bool serves(Side side, bool conv, Op op, at::ScalarType dtype);
// Whether autocast would change a call's types.
bool autocasts(Side side);

// Whether an ordinary call is under way: no transform, mode, tracer or other observer.
bool ordinary_state();

// A dense tensor on a CPU or a CUDA device and nothing else: no subclass, wrapper, lazy view or dual number.
bool plain(const at::Tensor &tensor);

// What decides whether a call is left to another backend. Without a geometry it is a linear layer's.
struct Question {
  const at::Tensor &activation;
  const Tensors &weights;
  const at::Tensor &coefficients;
  const Geometry *geometry;
  at::Tensor x = {};               // of a wgrad
  at::IntArrayRef input_size = {}; // of a convolution's dgrad
};
bool left(Side side, const Question &call);

// The function given to set_formulas.
PyObject *formulas();

} // namespace rl_kernels
