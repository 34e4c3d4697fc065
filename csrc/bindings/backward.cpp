#include "backward.h"

#include "cuda/ops.h"
#include "serving.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace rl_kernels {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What is saved of a call besides tensors, and as the one list of integers that autograd's context takes.
struct Saved {
  int64_t sources;
  bool has_biases;
  Geometry geometry;
  std::vector<int64_t> input_size;
  at::MemoryFormat format; // of a convolution's output

  static Saved of(const Call &call) {
    return {static_cast<int64_t>(call.weights.size()), call.biases.has_value(), call.geometry, call.x.sizes().vec(),
            call.conv() ? memory_format(call.x, call.weights) : at::MemoryFormat::Contiguous};
  }

  explicit operator std::vector<int64_t>() const {
    std::vector<int64_t> list{sources, has_biases, geometry.groups, static_cast<int64_t>(geometry.stride.size()),
                              static_cast<int64_t>(format)};
    for (const auto *part : {&geometry.stride, &geometry.padding, &geometry.dilation, &input_size})
      list.insert(list.end(), part->begin(), part->end());
    return list;
  }

  static Saved from(const std::vector<int64_t> &list) {
    auto next = list.begin() + 5;
    const auto take = [&](int64_t count) { return std::vector<int64_t>(std::exchange(next, next + count), next); };
    Saved saved{list[0], list[1] != 0, {}, {}, static_cast<at::MemoryFormat>(list[4])};
    saved.geometry = {take(list[3]), take(list[3]), take(list[3]), list[2]};
    saved.input_size = take(list.end() - next);
    return saved;
  }
};

// dy summed over everything but its channels, times the coefficients, which Outer ones are not: all that the biases
// need.
Tensors bias_gradients(const Tensor &dy, bool conv, const Tensor &coefficients, const Tensors &biases,
                       const Mask &wanted) {
  const int64_t channels = conv ? 1 : dy.dim() - 1;
  std::vector<int64_t> others;
  for (int64_t d = 0; d < dy.dim(); ++d)
    if (d != channels)
      others.push_back(d);
  const auto dtype = coefficients.scalar_type();
  const Tensor total = others.empty() ? dy.to(dtype) : dy.sum(others, /*keepdim=*/false, dtype);
  Tensors gradients(biases.size());
  for (size_t j = 0; j < biases.size(); ++j)
    if (wanted[j]) {
      const bool summed = coefficients.dim() == 3;
      const Tensor gradient = summed ? total : coefficients.select(0, static_cast<int64_t>(j)).mul(total);
      gradients[j] = gradient.to(biases[j].scalar_type(), /*non_blocking=*/false, /*copy=*/summed);
    }
  return gradients;
}

// The engine keeps the type of this exception only. Under Python's lock.
[[noreturn]] void throw_python(py::error_already_set &error) {
  error.restore();
  python_error kept;
  kept.persist();
  throw std::move(kept);
}

struct Backward {
  Tensor dy;
  Tensor x; // undefined where neither the weights nor the coefficients wanted a gradient
  Tensor coefficients;
  Tensors weights;
  Biases biases;
  Geometry geometry;
  std::vector<int64_t> input_size;
  bool wants_x;
  Wanted wanted;

  bool conv() const { return !geometry.stride.empty(); }

  // Whether a product makes dW; else the biases alone are asked for, or nothing.
  bool wants_product() const {
    return x.defined() && (wanted.coefficients ||
                           std::find(wanted.weights.begin(), wanted.weights.end(), true) != wanted.weights.end());
  }

  bool wants_biases() const {
    return std::find(wanted.biases.begin(), wanted.biases.end(), true) != wanted.biases.end();
  }

  bool kernels_can() const {
    if (c10::GradMode::is_enabled() || !ordinary_state() || !plain(dy) || !plain(coefficients) ||
        (x.defined() && !plain(x)))
      return false;
    for (const auto &weight : weights)
      if (!plain(weight))
        return false;
    if (biases)
      for (const auto &bias : *biases)
        if (!plain(bias))
          return false;
    const auto dtype = dy.scalar_type();
    const Side side = side_of(dy);
    if ((wants_x && !serves(side, conv(), Op::dgrad, dtype)) ||
        (wants_product() && !serves(side, conv(), Op::wgrad, dtype)))
      return false;
    const at::IntArrayRef pixels = conv() ? at::IntArrayRef(input_size) : at::IntArrayRef();
    return !left(side, {dy, weights, coefficients, conv() ? &geometry : nullptr, x, pixels});
  }

  bool on_cuda() const { return side_of(dy) == Side::cuda; }
  const Geometry *given_geometry() const { return conv() ? &geometry : nullptr; }

  Tensor dgrad() const {
    if (on_cuda()) {
      RECORD_FUNCTION(conv() ? "rl_kernels::mixed_conv_dgrad" : "rl_kernels::mixed_linear_dgrad",
                      c10::ArrayRef<const c10::IValue>{});
      return cuda_ops::dgrad(dy, {weights, coefficients, std::nullopt}, input_size, given_geometry());
    }
    if (conv()) {
      RECORD_FUNCTION("rl_kernels::mixed_conv_dgrad", c10::ArrayRef<const c10::IValue>{});
      return mixed_conv_dgrad(dy, weights, coefficients, input_size, geometry);
    }
    RECORD_FUNCTION("rl_kernels::mixed_linear_dgrad", c10::ArrayRef<const c10::IValue>{});
    return mixed_linear_dgrad(dy, weights, coefficients);
  }

  Gradients wgrad() const {
    if (on_cuda()) {
      RECORD_FUNCTION(conv() ? "rl_kernels::mixed_conv_wgrad" : "rl_kernels::mixed_linear_wgrad",
                      c10::ArrayRef<const c10::IValue>{});
      return cuda_ops::wgrad(dy, x, {weights, coefficients, biases}, wanted, given_geometry());
    }
    if (conv()) {
      RECORD_FUNCTION("rl_kernels::mixed_conv_wgrad", c10::ArrayRef<const c10::IValue>{});
      return mixed_conv_wgrad(dy, x, weights, coefficients, biases, wanted, geometry);
    }
    RECORD_FUNCTION("rl_kernels::mixed_linear_wgrad", c10::ArrayRef<const c10::IValue>{});
    return mixed_linear_wgrad(dy, x, weights, coefficients, biases, wanted);
  }

  // Of a linear layer, in one pass over the sources where there are few rows.
  std::pair<Tensor, Gradients> both() const {
    RECORD_FUNCTION("rl_kernels::mixed_linear_backward", c10::ArrayRef<const c10::IValue>{});
    return mixed_linear_backward(dy, x, weights, coefficients, biases, wanted);
  }

  // The gradients of x, of the coefficients, of the weights and of the biases, in this order; undefined where not
  // wanted.
  variable_list by_kernels() const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const size_t n = weights.size();
    variable_list found(2 + n + wanted.biases.size());
    Gradients gradients;
    if (wants_x && wants_product() && !conv() && !on_cuda())
      std::tie(found[0], gradients) = both();
    else {
      if (wants_x)
        found[0] = dgrad();
      if (wants_product())
        gradients = wgrad();
    }
    if (wants_product()) {
      auto &[dweights, dcoefficients, dbiases] = gradients;
      if (wanted.coefficients)
        found[1] = std::move(dcoefficients);
      for (size_t j = 0; j < n; ++j)
        if (wanted.weights[j])
          found[2 + j] = std::move(dweights[j]);
      for (size_t j = 0; j < wanted.biases.size(); ++j)
        if (wanted.biases[j])
          found[2 + n + j] = std::move(dbiases[j]);
    } else if (wants_biases()) {
      auto dbiases = bias_gradients(dy, conv(), coefficients, *biases, wanted.biases);
      std::move(dbiases.begin(), dbiases.end(), found.begin() + 2 + static_cast<int64_t>(n));
    }
    return found;
  }

  // The same by Python's formulas, which serve double backward, transforms, observers and other backends.
  variable_list by_formulas() const {
    const py::gil_scoped_acquire gil;
    try {
      const py::object geometry_arguments =
          conv() ? py::object(py::make_tuple(geometry.stride, geometry.padding, geometry.dilation, geometry.groups))
                 : py::object(py::tuple());
      const py::object result = py::reinterpret_borrow<py::object>(formulas())(
          conv(), dy, x.defined() ? py::cast(x) : py::none(), weights, coefficients, biases, input_size, wants_x,
          wanted.weights, wanted.coefficients, wanted.biases, geometry_arguments);
      variable_list found;
      for (const py::handle gradient : result)
        found.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
      return found;
    } catch (py::error_already_set &error) {
      throw_python(error);
    }
  }
};

variable_list by_kernels(const Backward &pass) {
  try {
    return pass.by_kernels();
  } catch (py::error_already_set &error) { // of a function that records, in tests
    const py::gil_scoped_acquire gil;
    throw_python(error);
  }
}

// Those that `context` saved and wants.
Backward read_context(AutogradContext *context, const Tensor &dy, Saved saved) {
  const auto n = static_cast<size_t>(saved.sources), m = saved.has_biases ? n : 0;
  auto tensors = context->get_saved_variables();
  const auto first_weight = tensors.begin() + 2, first_bias = first_weight + static_cast<int64_t>(n);
  Backward pass{dy,
                std::move(tensors[0]),
                std::move(tensors[1]),
                {first_weight, first_bias},
                {},
                std::move(saved.geometry),
                std::move(saved.input_size),
                context->needs_input_grad(0),
                {Mask(n), context->needs_input_grad(1), Mask(m)}};
  if (m > 0)
    pass.biases.emplace(first_bias, tensors.end());
  for (size_t j = 0; j < n; ++j)
    pass.wanted.weights[j] = context->needs_input_grad(2 + j);
  for (size_t j = 0; j < m; ++j)
    pass.wanted.biases[j] = context->needs_input_grad(2 + n + j);
  // As torch's own backward: gradients have the output's format, however dy comes (expanded, say). Not contiguous(),
  // which leaves sizes of 1 as they are.
  if (pass.conv() && memory_format(pass.dy, pass.weights) != saved.format)
    pass.dy = pass.dy.clone(saved.format);
  return pass;
}

} // namespace

std::vector<int64_t> saved_integers(const Call &call) { return static_cast<std::vector<int64_t>>(Saved::of(call)); }

variable_list run_backward(AutogradContext *context, const Tensor &dy) {
  auto saved = Saved::from(context->saved_data["call"].toIntVector());
  variable_list results(3 + static_cast<size_t>(saved.sources) * (saved.has_biases ? 2 : 1));
  if (!dy.defined())
    return results;
  const Backward pass = read_context(context, dy, std::move(saved));
  auto found = pass.kernels_can() ? by_kernels(pass) : pass.by_formulas();
  std::move(found.begin(), found.end(), results.begin() + 1);
  return results;
}

} // namespace rl_kernels
