#include "autograd.h"

#include "cpu/ops.h"

#include <ATen/Functions.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <tuple>
#include <utility>

namespace rl_kernels {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What is in force, set from Python.

enum class Op { forward, dgrad, wgrad };

constexpr std::array<const char *, 6> op_names = {"mixed_linear", "mixed_linear_dgrad", "mixed_linear_wgrad",
                                                  "mixed_conv",   "mixed_conv_dgrad",   "mixed_conv_wgrad"};
constexpr std::array dtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

std::atomic<uint32_t> serving = 0;
std::atomic<bool> forced = false;
std::atomic<bool> bypassed = false;
std::atomic<PyObject *> formulas = nullptr;

uint32_t bit(size_t op, at::ScalarType dtype) {
  for (size_t j = 0; j < dtypes.size(); ++j)
    if (dtypes[j] == dtype)
      return uint32_t{1} << (op * dtypes.size() + j);
  return 0;
}

bool serves(bool conv, Op op, at::ScalarType dtype) {
  return (serving.load(std::memory_order_relaxed) & bit(3 * conv + static_cast<size_t>(op), dtype)) != 0;
}

// Whether an ordinary call is under way: no transform, mode, tracer or other observer.
bool ordinary_state() {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  constexpr auto autocast = c10::default_excluded_set;
  constexpr auto inference_included = c10::default_included_set.remove(DispatchKey::ADInplaceOrView);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto excluded = keys.excluded_ - autocast;
  const bool eager = keys.included_ == c10::default_included_set && excluded.empty();
  const bool inference = keys.included_ == inference_included && excluded == c10::autograd_dispatch_keyset;
  return (eager || inference) && !at::impl::torch_function_mode_enabled() && !bypassed.load(std::memory_order_relaxed);
}

// A dense CPU tensor and nothing else: no subclass, wrapper, lazy view or dual number.
bool plain(const Tensor &tensor) {
  using c10::DispatchKey;
  constexpr auto expected = c10::DispatchKeySet(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  const auto *impl = tensor.unsafeGetTensorImpl();
  const auto keys = impl->key_set().raw_repr();
  return keys != 0 && (keys & ~expected.raw_repr()) == 0 &&
         (impl->autograd_meta() == nullptr || !tensor._fw_grad(/*level=*/0).defined());
}

struct Call {
  Tensor x, coefficients;
  Tensors weights;
  Biases biases;
  Geometry geometry; // of a convolution

  bool conv() const { return !geometry.stride.empty(); }
};

// Python's arguments. Nothing is raised: what does not read as expected is declined.

const Tensor *as_tensor(PyObject *object) {
  if (!THPVariable_CheckExact(object))
    return nullptr;
  const Tensor &tensor = THPVariable_Unpack(object);
  return plain(tensor) ? &tensor : nullptr;
}

Py_ssize_t length(PyObject *object) {
  return PyList_CheckExact(object) || PyTuple_CheckExact(object) ? PySequence_Fast_GET_SIZE(object) : -1;
}

PyObject *item(PyObject *sequence, Py_ssize_t j) { return PySequence_Fast_GET_ITEM(sequence, j); }

// The tensors of a list or tuple, of one shape and dtype.
bool read_tensors(PyObject *object, Tensors &tensors) {
  const auto n = length(object);
  if (n < 1)
    return false;
  tensors.reserve(n);
  for (Py_ssize_t j = 0; j < n; ++j) {
    const Tensor *tensor = as_tensor(item(object, j));
    if (tensor == nullptr)
      return false;
    if (j > 0 && (tensor->sizes() != tensors[0].sizes() || tensor->scalar_type() != tensors[0].scalar_type()))
      return false;
    tensors.push_back(*tensor);
  }
  return true;
}

// A tensor, or the numbers of a list or tuple, in the dtype in which the sources mix.
bool read_coefficients(PyObject *object, const Tensors &weights, Tensor &coefficients) {
  const auto dtype = weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto n = static_cast<int64_t>(weights.size());
  if (const Tensor *tensor = as_tensor(object)) {
    const auto sizes = tensor->sizes();
    const bool fits = sizes.size() == 1 || (sizes.size() == 2 && sizes[1] == weights[0].size(0));
    coefficients = *tensor;
    return fits && sizes[0] == n && tensor->scalar_type() == dtype;
  }
  if (length(object) != n)
    return false;
  for (int64_t j = 0; j < n; ++j)
    if (!PyFloat_CheckExact(item(object, j)))
      return false;
  const at::AutoDispatchBelowADInplaceOrView below;
  coefficients = at::empty({n}, at::TensorOptions().dtype(dtype).device(at::kCPU));
  for (int64_t j = 0; j < n; ++j) {
    const double value = PyFloat_AS_DOUBLE(item(object, j));
    if (dtype == at::kDouble)
      coefficients.mutable_data_ptr<double>()[j] = value;
    else
      coefficients.mutable_data_ptr<float>()[j] = static_cast<float>(value);
  }
  return true;
}

bool read_integer(PyObject *object, int64_t least, int64_t &value) {
  if (!PyLong_CheckExact(object))
    return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 && value >= least;
}

// An integer, or one or `spatial` of them.
bool read_integers(PyObject *object, size_t spatial, int64_t least, std::vector<int64_t> &values) {
  const auto n = length(object);
  values.resize(spatial);
  for (size_t d = 0; d < spatial; ++d) {
    if (n >= 0 && n != 1 && n != static_cast<Py_ssize_t>(spatial))
      return false;
    if (!read_integer(n < 0 ? object : item(object, n == 1 ? 0 : static_cast<Py_ssize_t>(d)), least, values[d]))
      return false;
  }
  return true;
}

bool read_recipe(PyObject *const *arguments, Call &call) {
  const Tensor *x = as_tensor(arguments[0]);
  if (x == nullptr || !read_tensors(arguments[1], call.weights))
    return false;
  call.x = *x;
  const Tensor &weight = call.weights[0];
  if (weight.dim() < 2 || !read_coefficients(arguments[2], call.weights, call.coefficients))
    return false;
  const auto dtype = x->scalar_type();
  const bool halved = weight.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  if (dtype != weight.scalar_type() && !halved)
    return false;
  if (arguments[3] == Py_None)
    return true;
  Tensors &biases = call.biases.emplace();
  return read_tensors(arguments[3], biases) && biases.size() == call.weights.size() && biases[0].dim() == 1 &&
         biases[0].size(0) == weight.size(0) && biases[0].scalar_type() == weight.scalar_type();
}

bool read_geometry(PyObject *const *arguments, Call &call) {
  int64_t spatial = 0;
  Geometry &geometry = call.geometry;
  if (!read_integer(arguments[0], 1, spatial) || spatial > 3 ||
      !read_integers(arguments[1], spatial, 1, geometry.stride))
    return false;
  if (!read_integers(arguments[2], spatial, 0, geometry.padding) ||
      !read_integers(arguments[3], spatial, 1, geometry.dilation) || !read_integer(arguments[4], 1, geometry.groups))
    return false;
  const auto x = call.x.sizes(), weight = call.weights[0].sizes();
  if (weight.size() != x.size() || static_cast<int64_t>(x.size()) != spatial + 2 || weight[0] % geometry.groups != 0 ||
      x[1] != weight[1] * geometry.groups)
    return false;
  for (int64_t d = 0; d < spatial; ++d) {
    if (weight[d + 2] < 1)
      return false;
    // As in functional.py: a dilated kernel of 1 is one of 1.
    if (weight[d + 2] == 1)
      geometry.dilation[d] = 1;
    if (x[d + 2] + 2 * geometry.padding[d] < geometry.dilation[d] * (weight[d + 2] - 1) + 1)
      return false;
  }
  return true;
}

// Why a call is left to another backend; nullptr where it is not.
const char *declined(const Tensor &activation, const Tensors &weights, const Geometry *geometry) {
  const char *reason = geometry ? refuses_conv(activation, weights, *geometry) : refuses_linear(activation, weights);
  if (reason != nullptr || forced.load(std::memory_order_relaxed))
    return reason;
  return geometry ? slower_conv(activation, weights, *geometry) : slower_linear(activation, weights);
}

bool needs_gradient(const Tensors &tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor &t) { return t.requires_grad(); });
}

Tensor forward(const Call &call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (call.conv()) {
    RECORD_FUNCTION("rl_kernels::mixed_conv", c10::ArrayRef<const c10::IValue>{});
    return mixed_conv(call.x, call.weights, call.coefficients, call.biases, call.geometry);
  }
  RECORD_FUNCTION("rl_kernels::mixed_linear", c10::ArrayRef<const c10::IValue>{});
  return mixed_linear(call.x, call.weights, call.coefficients, call.biases);
}

// Backward.

// What a backward needs besides tensors, as the one list of integers in which it is saved.
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

// dy summed over everything but its channels, times the coefficients: all that the biases need.
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
    if (wanted[j])
      gradients[j] = coefficients.select(0, static_cast<int64_t>(j)).mul(total).to(biases[j].scalar_type());
  return gradients;
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
    if ((wants_x && !serves(conv(), Op::dgrad, dtype)) || (wants_product() && !serves(conv(), Op::wgrad, dtype)))
      return false;
    return declined(dy, weights, conv() ? &geometry : nullptr) == nullptr;
  }

  Tensor dgrad() const {
    if (conv()) {
      RECORD_FUNCTION("rl_kernels::mixed_conv_dgrad", c10::ArrayRef<const c10::IValue>{});
      return mixed_conv_dgrad(dy, weights, coefficients, input_size, geometry);
    }
    RECORD_FUNCTION("rl_kernels::mixed_linear_dgrad", c10::ArrayRef<const c10::IValue>{});
    return mixed_linear_dgrad(dy, weights, coefficients);
  }

  Gradients wgrad() const {
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
    if (wants_x && wants_product() && !conv())
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

  // The same by the formulas of _autograd.py, which serve double backward, transforms, observers and other backends.
  variable_list by_formulas() const {
    const py::gil_scoped_acquire gil;
    try {
      const py::object geometry_arguments =
          conv() ? py::object(py::make_tuple(geometry.stride, geometry.padding, geometry.dilation, geometry.groups))
                 : py::object(py::tuple());
      const py::object result = py::reinterpret_borrow<py::object>(formulas.load())(
          conv(), dy, x.defined() ? py::cast(x) : py::none(), weights, coefficients, biases, input_size, wants_x,
          wanted.weights, wanted.coefficients, wanted.biases, geometry_arguments);
      variable_list found;
      for (const py::handle gradient : result)
        found.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
      return found;
    } catch (py::error_already_set &error) {
      // The engine keeps the type of this exception only.
      error.restore();
      python_error kept;
      kept.persist();
      throw std::move(kept);
    }
  }
};

template <typename Kind> struct Mixed : torch::autograd::Function<Kind> {
  // `tensors`: x, the coefficients, the weights, the biases.
  static Tensor forward(AutogradContext *context, const Call &call, at::TensorList tensors) {
    variable_list kept = tensors.vec();
    if (!call.coefficients.requires_grad() && !needs_gradient(call.weights))
      kept[0] = Tensor();
    context->save_for_backward(std::move(kept));
    context->saved_data["call"] = static_cast<std::vector<int64_t>>(Saved::of(call));
    context->set_materialize_grads(false);
    return rl_kernels::forward(call);
  }

  static variable_list backward(AutogradContext *context, const variable_list &gradients) {
    auto saved = Saved::from(context->saved_data["call"].toIntVector());
    const auto n = static_cast<size_t>(saved.sources), m = saved.has_biases ? n : 0;
    // One more in front, for the argument that is no tensor.
    variable_list results(1);
    results.resize(3 + n + m);
    if (!gradients[0].defined())
      return results;
    auto tensors = context->get_saved_variables();
    Backward pass{gradients[0],
                  std::move(tensors[0]),
                  std::move(tensors[1]),
                  {},
                  {},
                  std::move(saved.geometry),
                  std::move(saved.input_size),
                  context->needs_input_grad(0),
                  {Mask(n), context->needs_input_grad(1), Mask(m)}};
    pass.weights.assign(tensors.begin() + 2, tensors.begin() + 2 + static_cast<int64_t>(n));
    if (m > 0)
      pass.biases.emplace(tensors.begin() + 2 + static_cast<int64_t>(n), tensors.end());
    // As torch's own backward: gradients have the output's format, however dy comes (expanded, say). Not contiguous(),
    // which leaves sizes of 1 as they are.
    if (pass.conv() && memory_format(pass.dy, pass.weights) != saved.format)
      pass.dy = pass.dy.clone(saved.format);
    for (size_t j = 0; j < n; ++j)
      pass.wanted.weights[j] = context->needs_input_grad(2 + j);
    for (size_t j = 0; j < m; ++j)
      pass.wanted.biases[j] = context->needs_input_grad(2 + n + j);
    auto found = pass.kernels_can() ? pass.by_kernels() : pass.by_formulas();
    std::move(found.begin(), found.end(), results.begin() + 1);
    return results;
  }
};

} // namespace

// Named, as grad_fn.name() shows them.
struct MixedLinear : Mixed<MixedLinear> {};
struct MixedConv : Mixed<MixedConv> {};

namespace {

Tensor run(const Call &call) {
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
  return forward(call);
}

bool takes(const Call &call) {
  return serves(call.conv(), Op::forward, call.x.scalar_type()) &&
         declined(call.x, call.weights, call.conv() ? &call.geometry : nullptr) == nullptr;
}

bool may_take() {
  return serving.load(std::memory_order_relaxed) != 0 && ordinary_state() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

PyObject *run_without_gil(const Call &call) {
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = run(call);
  }
  return THPVariable_Wrap(std::move(y));
}

} // namespace

uint32_t serving_bit(const std::string &op, c10::ScalarType dtype) {
  const auto *found = std::find(op_names.begin(), op_names.end(), op);
  return found == op_names.end() ? 0 : bit(static_cast<size_t>(found - op_names.begin()), dtype);
}

void set_serving(uint32_t bits, bool asked_for) {
  serving.store(bits);
  forced.store(asked_for);
}

void set_bypassed(bool value) { bypassed.store(value); }

void set_formulas(PyObject *function) {
  Py_INCREF(function);
  Py_XDECREF(formulas.exchange(function));
}

PyObject *mixed_linear_call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (count != 4 || !may_take() || !read_recipe(arguments, call))
    Py_RETURN_NONE;
  const auto x = call.x.sizes(), weight = call.weights[0].sizes();
  if (weight.size() != 2 || x.empty() || x.back() != weight[1] || !takes(call))
    Py_RETURN_NONE;
  return run_without_gil(call);
  END_HANDLE_TH_ERRORS
}

PyObject *mixed_conv_call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (count != 9 || !may_take() || !read_recipe(arguments, call) || !read_geometry(arguments + 4, call) || !takes(call))
    Py_RETURN_NONE;
  return run_without_gil(call);
  END_HANDLE_TH_ERRORS
}

} // namespace rl_kernels
