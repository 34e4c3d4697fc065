#include "read_arguments.h"

#include "serving.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <vector>

namespace rl_kernels {
namespace {

using at::Tensor;

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

// The tensors of a list or tuple, of one shape and dtype, on a device.
bool read_tensors(PyObject *object, const c10::Device &device, Tensors &tensors) {
  const auto n = length(object);
  if (n < 1)
    return false;
  tensors.reserve(n);
  for (Py_ssize_t j = 0; j < n; ++j) {
    const Tensor *tensor = as_tensor(item(object, j));
    if (tensor == nullptr || tensor->device() != device)
      return false;
    if (j > 0 && (tensor->sizes() != tensors[0].sizes() || tensor->scalar_type() != tensors[0].scalar_type()))
      return false;
    tensors.push_back(*tensor);
  }
  return true;
}

// Whether coefficients of these sizes, the first aside, fit the weights; three are of Outer ones, joined.
bool fits_weights(at::IntArrayRef sizes, const Tensor &weight, bool joined) {
  const int64_t out = weight.size(0);
  if (sizes.size() == 3)
    return joined && out > 0 && sizes[1] > 0 && sizes[2] == out + weight.numel() / out;
  return sizes.size() == 1 || (sizes.size() == 2 && sizes[1] == out);
}

// A tensor, or the numbers of a list or tuple, in the dtype in which the sources mix.
bool read_coefficients(PyObject *object, const c10::Device &device, const Tensors &weights, bool joined,
                       Tensor &coefficients) {
  const auto dtype = weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto n = static_cast<int64_t>(weights.size());
  if (const Tensor *tensor = as_tensor(object)) {
    const auto sizes = tensor->sizes();
    const bool fits = fits_weights(sizes, weights[0], joined);
    coefficients = *tensor;
    return fits && sizes[0] == n && tensor->scalar_type() == dtype && tensor->device() == device;
  }
  if (length(object) != n || !device.is_cpu())
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

bool read_integer(PyObject *object, int64_t minimum, int64_t &value) {
  if (!PyLong_CheckExact(object))
    return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 && value >= minimum;
}

// An integer, or one or `spatial` of them.
bool read_integers(PyObject *object, size_t spatial, int64_t minimum, std::vector<int64_t> &values) {
  const auto n = length(object);
  values.resize(spatial);
  for (size_t d = 0; d < spatial; ++d) {
    if (n >= 0 && n != 1 && n != static_cast<Py_ssize_t>(spatial))
      return false;
    if (!read_integer(n < 0 ? object : item(object, n == 1 ? 0 : static_cast<Py_ssize_t>(d)), minimum, values[d]))
      return false;
  }
  return true;
}

bool read_recipe(PyObject *const *arguments, Call &call) {
  const Tensor *x = as_tensor(arguments[0]);
  if (x == nullptr || !read_tensors(arguments[1], x->device(), call.weights))
    return false;
  call.x = *x;
  const Tensor &weight = call.weights[0];
  if (weight.dim() < 2 || !read_coefficients(arguments[2], x->device(), call.weights, call.joined, call.coefficients))
    return false;
  const auto dtype = x->scalar_type();
  const bool halved = weight.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  if (dtype != weight.scalar_type() && !halved)
    return false;
  if (arguments[3] == Py_None)
    return true;
  Tensors &biases = call.biases.emplace();
  return read_tensors(arguments[3], x->device(), biases) && biases.size() == call.weights.size() &&
         biases[0].dim() == 1 && biases[0].size(0) == weight.size(0) && biases[0].scalar_type() == weight.scalar_type();
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

} // namespace

bool read_linear(PyObject *const *arguments, Call &call) {
  if (!read_recipe(arguments, call))
    return false;
  const auto x = call.x.sizes(), weight = call.weights[0].sizes();
  return weight.size() == 2 && !x.empty() && x.back() == weight[1];
}

bool read_conv(PyObject *const *arguments, Call &call) {
  return read_recipe(arguments, call) && read_geometry(arguments + 4, call);
}

} // namespace rl_kernels
