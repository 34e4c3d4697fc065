#include "serving.h"

#include "cuda/kernels_library.h"
#include "cuda/posing.h"
#include "cuda/rules.h"
#include "fast_path.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

namespace rl_kernels {
namespace {

constexpr std::array<const char *, 6> op_names = {"mixed_linear", "mixed_linear_dgrad", "mixed_linear_wgrad",
                                                  "mixed_conv",   "mixed_conv_dgrad",   "mixed_conv_wgrad"};
constexpr std::array dtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

// Of each side.
std::atomic<uint32_t> serving_bits[2] = {0, 0};
std::atomic<bool> forced[2] = {false, false};
std::atomic<bool> bypassed = false;
std::atomic<PyObject *> formulas_ = nullptr;

// Of a pair in serving_bits; 0 for a dtype that the kernels do not know.
uint32_t bit(size_t op, at::ScalarType dtype) {
  for (size_t j = 0; j < dtypes.size(); ++j)
    if (dtypes[j] == dtype)
      return uint32_t{1} << (op * dtypes.size() + j);
  return 0;
}

// torch before 2.13 has a key for named tensors, which plain() refuses, and excludes it in every backward.
template <class Key> constexpr c10::DispatchKeySet named() {
  if constexpr (requires { Key::Named; })
    return c10::DispatchKeySet(Key::Named);
  else
    return {};
}

size_t place(Side side) { return static_cast<size_t>(side); }

bool left_by_cpu(const Question &call) {
  const auto &[activation, weights, coefficients, geometry, x, input_size] = call;
  const char *reason = geometry ? why_not_conv(activation, weights, *geometry) : why_not_linear(activation, weights);
  if (reason != nullptr || forced[place(Side::cpu)].load(std::memory_order_relaxed))
    return reason != nullptr;
  reason = geometry ? worse_conv(activation, weights, coefficients, x.defined(), *geometry)
                    : worse_linear(activation, weights, coefficients, x.defined());
  return reason != nullptr;
}

bool left_by_cuda(const Question &call) {
  const auto &[activation, weights, coefficients, geometry, x, input_size] = call;
  if (coefficients.dim() == 3) // Outer ones
    return true;
  if (cuda_ops::opened_library() == nullptr || cuda_ops::facts_of(activation.device()).capability < 80)
    return true;
  if (activation.scalar_type() == at::kFloat && !cuda_ops::allows_tf32(geometry != nullptr))
    return true;
  if (cuda_ops::why_not(activation, weights, coefficients, input_size, geometry))
    return true;
  return !forced[place(Side::cuda)].load(std::memory_order_relaxed) &&
         cuda_ops::worse(activation, x, weights, geometry);
}

} // namespace

Side side_of(const at::Tensor &tensor) { return tensor.is_cuda() || cuda_ops::poses() ? Side::cuda : Side::cpu; }

bool serves_anything() {
  return (serving_bits[0].load(std::memory_order_relaxed) | serving_bits[1].load(std::memory_order_relaxed)) != 0;
}

bool serves(Side side, bool conv, Op op, at::ScalarType dtype) {
  const auto bits = serving_bits[place(side)].load(std::memory_order_relaxed);
  return (bits & bit(3 * conv + static_cast<size_t>(op), dtype)) != 0;
}

bool autocasts(Side side) { return at::autocast::is_autocast_enabled(side == Side::cuda ? at::kCUDA : at::kCPU); }

bool left(Side side, const Question &call) { return side == Side::cpu ? left_by_cpu(call) : left_by_cuda(call); }

bool ordinary_state() {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  constexpr auto autocast = c10::default_excluded_set;
  constexpr auto inference_included = c10::default_included_set.remove(DispatchKey::ADInplaceOrView);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto excluded = keys.excluded_ - autocast - named<DispatchKey>();
  const bool eager = keys.included_ == c10::default_included_set && excluded.empty();
  const bool inference = keys.included_ == inference_included && excluded == c10::autograd_dispatch_keyset;
  return (eager || inference) && !at::impl::torch_function_mode_enabled() && !bypassed.load(std::memory_order_relaxed);
}

bool plain(const at::Tensor &tensor) {
  using c10::DispatchKey;
  constexpr auto on_cpu = c10::DispatchKeySet(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  constexpr auto on_cuda = c10::DispatchKeySet(
      {DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  const auto *impl = tensor.unsafeGetTensorImpl();
  const auto keys = impl->key_set().raw_repr();
  const auto expected = tensor.is_cuda() ? on_cuda : on_cpu;
  return keys != 0 && (keys & ~expected.raw_repr()) == 0 &&
         (impl->autograd_meta() == nullptr || !tensor._fw_grad(/*level=*/0).defined());
}

PyObject *formulas() { return formulas_.load(); }

// What Python sets (fast_path.h).

uint32_t serving_bit(const std::string &op, c10::ScalarType dtype) {
  const auto *found = std::find(op_names.begin(), op_names.end(), op);
  return found == op_names.end() ? 0 : bit(static_cast<size_t>(found - op_names.begin()), dtype);
}

void set_serving(uint32_t bits, bool asked_for, bool cuda) {
  serving_bits[cuda].store(bits);
  forced[cuda].store(asked_for);
}

void set_bypassed(bool value) { bypassed.store(value); }

void set_formulas(PyObject *function) {
  Py_INCREF(function);
  Py_XDECREF(formulas_.exchange(function));
}

} // namespace rl_kernels
