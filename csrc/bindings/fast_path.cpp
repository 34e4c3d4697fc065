#include "fast_path.h"

#include "backward.h"
#include "cpu/torch/ops.h"
#include "cuda/ops.h"
#include "read_arguments.h"
#include "serving.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

namespace rl_kernels {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

bool takes(const Call &call) {
  const Side side = side_of(call.x);
  return serves(side, call.conv(), Op::forward, call.x.scalar_type()) && !autocasts(side) &&
         !left(side, {call.x, call.weights, call.coefficients, call.conv() ? &call.geometry : nullptr});
}

bool may_take() { return serves_anything() && ordinary_state(); }

PyObject *run_without_gil(const Call &call);

} // namespace

// The entries: decline, or read the arguments and run.

PyObject *mixed_linear_call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  call.joined = count == 5 && arguments[4] == Py_True;
  if ((count != 4 && count != 5) || !may_take() || !read_linear(arguments, call) || !takes(call))
    Py_RETURN_NONE;
  return run_without_gil(call);
  END_HANDLE_TH_ERRORS
}

PyObject *mixed_conv_call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  call.joined = count == 10 && arguments[9] == Py_True;
  if ((count != 9 && count != 10) || !may_take() || !read_conv(arguments, call) || !takes(call))
    Py_RETURN_NONE;
  return run_without_gil(call);
  END_HANDLE_TH_ERRORS
}

// The run, recorded for autograd where a tensor needs a gradient.

namespace {

bool needs_gradient(const Tensors &tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor &t) { return t.requires_grad(); });
}

Tensor run_kernels(const Call &call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const bool cuda = side_of(call.x) == Side::cuda;
  const cuda_ops::Mixture recipe = {call.weights, call.coefficients, call.biases};
  if (call.conv()) {
    RECORD_FUNCTION("rl_kernels::mixed_conv", c10::ArrayRef<const c10::IValue>{});
    if (cuda)
      return cuda_ops::forward(call.x, recipe, &call.geometry);
    return mixed_conv(call.x, call.weights, call.coefficients, call.biases, call.geometry);
  }
  RECORD_FUNCTION("rl_kernels::mixed_linear", c10::ArrayRef<const c10::IValue>{});
  if (cuda)
    return cuda_ops::forward(call.x, recipe, nullptr);
  return mixed_linear(call.x, call.weights, call.coefficients, call.biases);
}

template <typename Kind> struct Mixed : torch::autograd::Function<Kind> {
  // `tensors`: x, the coefficients, the weights, the biases.
  static Tensor forward(AutogradContext *context, const Call &call, at::TensorList tensors) {
    variable_list kept = tensors.vec();
    if (!call.coefficients.requires_grad() && !needs_gradient(call.weights))
      kept[0] = Tensor();
    context->save_for_backward(std::move(kept));
    context->saved_data["call"] = saved_integers(call);
    context->set_materialize_grads(false);
    return run_kernels(call);
  }

  static variable_list backward(AutogradContext *context, const variable_list &gradients) {
    return run_backward(context, gradients[0]);
  }
};

} // namespace

// Named, as grad_fn.name() shows them.
struct MixedLinear : Mixed<MixedLinear> {};
struct MixedConv : Mixed<MixedConv> {};

namespace {

Tensor run_recorded(const Call &call) {
  if (c10::GradMode::is_enabled()) {
    Tensors tensors{call.x, call.coefficients};
    tensors.reserve(2 + 2 * call.weights.size());
    tensors.insert(tensors.end(), call.weights.begin(), call.weights.end());
    if (call.biases)
      tensors.insert(tensors.end(), call.biases->begin(), call.biases->end());
    if (needs_gradient(tensors)) {
      const at::TensorList list(tensors);
      return call.conv() ? MixedConv::apply(call, list) : MixedLinear::apply(call, list);
    }
  }
  return run_kernels(call);
}

PyObject *run_without_gil(const Call &call) {
  Tensor y;
  try {
    const pybind11::gil_scoped_release no_gil;
    y = run_recorded(call);
  } catch (pybind11::error_already_set &error) { // of a function that records, in tests
    error.restore();
    return nullptr;
  }
  return THPVariable_Wrap(std::move(y));
}

} // namespace

} // namespace rl_kernels
