#include "module.h"

#include "kernels_library.h"
#include "ops.h"
#include "posing.h"
#include "rules.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

namespace rl_kernels::cuda_ops {
namespace {

namespace py = pybind11;
using at::Tensor;
using Integers = std::vector<int64_t>;
// A convolution's stride, padding, dilation and groups.
using GeometryTuple = std::optional<std::tuple<Integers, Integers, Integers, int64_t>>;
// Of an op: the caller's choice of tiles or None, and what cuda::Held holds.
using SettingsTuple = std::pair<py::object, std::array<int32_t, 4>>;

std::optional<Geometry> geometry_of(const GeometryTuple &given) {
  if (!given)
    return std::nullopt;
  const auto &[stride, padding, dilation, groups] = *given;
  return Geometry{stride, padding, dilation, groups};
}

Settings settings_of(const SettingsTuple &given) {
  const auto &[choose, held] = given;
  return {choose.is_none() ? nullptr : choose.ptr(), {held[0], held[1], held[2], held[3]}};
}

// The kernels see no autograd and hold no lock of Python's.
struct Outside {
  py::gil_scoped_release no_gil;
  at::AutoDispatchBelowADInplaceOrView below;
};

const Geometry *pointer(const std::optional<Geometry> &geometry) { return geometry ? &*geometry : nullptr; }

void define_ops(py::module_ &module) {
  module.def("forward", [](const Tensor &x, const Tensors &weights, const Tensor &coefficients, const Biases &biases,
                           const GeometryTuple &geometry, const SettingsTuple &settings) {
    const auto read = geometry_of(geometry);
    const auto how = settings_of(settings);
    const Outside outside;
    return forward(x, {weights, coefficients, biases}, pointer(read), how);
  });
  module.def("dgrad", [](const Tensor &dy, const Tensors &weights, const Tensor &coefficients,
                         const Integers &input_size, const GeometryTuple &geometry, const SettingsTuple &settings) {
    const auto read = geometry_of(geometry);
    const auto how = settings_of(settings);
    const Outside outside;
    return dgrad(dy, {weights, coefficients, std::nullopt}, input_size, pointer(read), how);
  });
  module.def("wgrad", [](const Tensor &dy, const Tensor &x, const std::tuple<Tensors, Tensor, Biases> &recipe,
                         const std::tuple<Mask, bool, Mask> &wanted, const GeometryTuple &geometry,
                         const std::optional<std::vector<std::optional<Tensor>>> &into, const SettingsTuple &settings) {
    const auto &[weights, coefficients, biases] = recipe;
    const auto &[wants_weights, wants_coefficients, wants_biases] = wanted;
    const auto read = geometry_of(geometry);
    const auto how = settings_of(settings);
    Into added;
    if (into)
      for (added.emplace(); const auto &buffer : *into)
        added->push_back(buffer.value_or(Tensor()));
    const Outside outside;
    return wgrad(dy, x, {weights, coefficients, biases}, {wants_weights, wants_coefficients, wants_biases},
                 pointer(read), added, how);
  });
  module.def("multiply",
             [](const Tensor &out, const Tensor &activation, const std::tuple<Tensors, Tensor, Biases> &recipe,
                bool transposed, const GeometryTuple &geometry, const SettingsTuple &settings) {
               const auto &[weights, coefficients, biases] = recipe;
               const auto read = geometry_of(geometry);
               const auto how = settings_of(settings);
               const Outside outside;
               multiply(transposed ? "dgrad" : "forward", out, activation, {weights, coefficients, biases}, transposed,
                        pointer(read), how);
             });
}

void define_rules(py::module_ &module) {
  module.def("why_not", [](const Tensor &activation, const Tensors &weights, const Tensor &coefficients,
                           const Integers &input_size, const GeometryTuple &geometry) {
    const auto read = geometry_of(geometry);
    return why_not(activation, weights, coefficients, input_size, pointer(read));
  });
  module.def("worse", [](const Tensor &activation, const std::optional<Tensor> &x, const Tensors &weights,
                         const GeometryTuple &geometry) {
    const auto read = geometry_of(geometry);
    return worse(activation, x.value_or(Tensor()), weights, pointer(read));
  });
  module.def("allows_tf32", &allows_tf32);
}

} // namespace

void define(py::module_ &module) {
  auto cuda = module.def_submodule("cuda");
  cuda.def("open_library", &open_library);
  cuda.def("pose", [](const std::array<int32_t, 3> &device, const py::object &record) {
    set_pose(std::make_shared<const Pose>(Pose{{device[0], device[1], device[2]}, record}));
  });
  cuda.def("end_pose", [] { set_pose(nullptr); });
  define_ops(cuda);
  define_rules(cuda);
}

} // namespace rl_kernels::cuda_ops
