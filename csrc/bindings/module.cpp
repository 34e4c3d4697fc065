// The module rl_kernels._C: the CPU kernels as Python registers them, the fast path, and what was built.
#include "cuda/module.h"
#include "cpu/torch/ops.h"
#include "fast_path.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

#ifndef RL_KERNELS_TORCH
#error "RL_KERNELS_TORCH: the version of torch that this is built for, as a string"
#endif
#ifndef RL_KERNELS_OPTIONS
#define RL_KERNELS_OPTIONS ""
#endif

namespace {

namespace py = pybind11;
using namespace rl_kernels;
using at::Tensor;
using Integers = std::vector<int64_t>;

// The kernels see no autograd and hold no lock of Python's.
struct Outside {
  py::gil_scoped_release no_gil;
  at::AutoDispatchBelowADInplaceOrView below;
};

// The ops' schemas are flat; structs begin here.

void define_linear(py::module_ &module) {
  module.def("mixed_linear",
             [](const Tensor &x, const Tensors &weights, const Tensor &coefficients, const Biases &biases) {
               const Outside outside;
               return mixed_linear(x, weights, coefficients, biases);
             });
  module.def("mixed_linear_dgrad", [](const Tensor &dy, const Tensors &weights, const Tensor &coefficients) {
    const Outside outside;
    return mixed_linear_dgrad(dy, weights, coefficients);
  });
  module.def("mixed_linear_wgrad", [](const Tensor &dy, const Tensor &x, const Tensors &weights,
                                      const Tensor &coefficients, const Biases &biases, const Mask &wants_weights,
                                      bool wants_coefficients, const Mask &wants_biases) {
    const Outside outside;
    return mixed_linear_wgrad(dy, x, weights, coefficients, biases, {wants_weights, wants_coefficients, wants_biases});
  });
  module.def("why_not_linear", &why_not_linear);
  module.def("worse_linear", &worse_linear);
}

void define_conv(py::module_ &module) {
  module.def("mixed_conv",
             [](const Tensor &x, const Tensors &weights, const Tensor &coefficients, const Biases &biases,
                const Integers &stride, const Integers &padding, const Integers &dilation, int64_t groups) {
               const Outside outside;
               return mixed_conv(x, weights, coefficients, biases, {stride, padding, dilation, groups});
             });
  module.def("mixed_conv_dgrad",
             [](const Tensor &dy, const Tensors &weights, const Tensor &coefficients, const Integers &input_size,
                const Integers &stride, const Integers &padding, const Integers &dilation, int64_t groups) {
               const Outside outside;
               return mixed_conv_dgrad(dy, weights, coefficients, input_size, {stride, padding, dilation, groups});
             });
  module.def("mixed_conv_wgrad", [](const Tensor &dy, const Tensor &x, const Tensors &weights,
                                    const Tensor &coefficients, const Biases &biases, const Mask &wants_weights,
                                    bool wants_coefficients, const Mask &wants_biases, const Integers &stride,
                                    const Integers &padding, const Integers &dilation, int64_t groups) {
    const Outside outside;
    return mixed_conv_wgrad(dy, x, weights, coefficients, biases, {wants_weights, wants_coefficients, wants_biases},
                            {stride, padding, dilation, groups});
  });
  module.def("why_not_conv", [](const Tensor &activation, const Tensors &weights, const Integers &stride,
                                const Integers &padding, const Integers &dilation, int64_t groups) {
    return why_not_conv(activation, weights, {stride, padding, dilation, groups});
  });
  module.def("worse_conv",
             [](const Tensor &activation, const Tensors &weights, const Tensor &coefficients, bool wgrad,
                const Integers &stride, const Integers &padding, const Integers &dilation, int64_t groups) {
               return worse_conv(activation, weights, coefficients, wgrad, {stride, padding, dilation, groups});
             });
}

py::dict build_info() {
  py::dict info;
  info["torch"] = RL_KERNELS_TORCH;
  info["compiler"] = __VERSION__;
  info["options"] = RL_KERNELS_OPTIONS;
  info["capability"] = capability();
  info["capabilities"] = capabilities();
  info["workspace_bytes_a_thread"] = workspace_bytes_a_thread();
  return info;
}

// Not by pybind11: reading the arguments is much of what a small call costs.
PyMethodDef calls[] = {
    {"mixed_linear_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(mixed_linear_call)), METH_FASTCALL,
     "(x, weights, coefficients, biases, joined=False): the layer, or None where the fast path declines"},
    {"mixed_conv_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(mixed_conv_call)), METH_FASTCALL,
     "(x, weights, coefficients, biases, spatial, stride, padding, dilation, groups, joined=False): as "
     "mixed_linear_call"},
    {nullptr, nullptr, 0, nullptr},
};

} // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info);

  define_linear(module);
  define_conv(module);
  cuda_ops::define(module);

  module.def("serving_bit", &serving_bit);
  module.def("set_serving", &set_serving, py::arg("bits"), py::arg("forced"), py::arg("cuda") = false);
  module.def("set_bypassed", &set_bypassed);
  module.def("set_formulas", [](const py::object &function) { set_formulas(function.ptr()); });
  if (PyModule_AddFunctions(module.ptr(), calls) != 0)
    throw py::error_already_set();
}
