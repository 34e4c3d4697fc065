#include "session.h"

#include "kernels_library.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <dlfcn.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace rl_kernels::cuda_ops {
namespace {

namespace py = pybind11;
using at::Tensor;

// The stream in use, as CUDA has it, through what torch has for every kind of device.
void *current_stream(const c10::Device &device, bool posing) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream stream = guard.getStream(device);
  if (posing)
    return reinterpret_cast<void *>(stream.id());
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  return guard.getStreamNativeHandle(stream);
#else
  // Older ones leave that to c10::cuda::CUDAStream, which is a Stream and nothing else.
  using Handle = void *(*)(const c10::Stream *);
  static const auto handle = [] {
    void *library = dlopen("libc10_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Handle>(dlsym(library, "_ZNK3c104cuda10CUDAStream6streamEv"));
  }();
  TORCH_CHECK(handle != nullptr, "this torch has no CUDA streams");
  return handle(&stream);
#endif
}

} // namespace

Session::Session(const char *op, std::vector<Tensor> operands) : op_(op), operands_(std::move(operands)) {
  pose_ = posing();
}

void Session::writes(const Tensor &tensor) {
  if (pose_ != nullptr)
    written_.push_back(tensor);
}

std::string Session::described() const {
  std::ostringstream text;
  text << op_ << " on ";
  for (size_t i = 0; i < operands_.size(); ++i) {
    text << (i > 0 ? ", (" : "(");
    const auto sizes = operands_[i].sizes();
    for (size_t d = 0; d < sizes.size(); ++d)
      text << (d > 0 ? ", " : "") << sizes[d];
    text << (sizes.size() == 1 ? ",)" : ")");
  }
  text << ": ";
  return text.str();
}

void Session::run(cuda::Call &call, const Settings &settings) {
  const c10::Device device = operands_[0].device();
  int32_t failed = 0;
  const KernelsLibrary *library = opened_library();
  try {
    TORCH_CHECK(library != nullptr, "the CUDA kernels are missing");
    TORCH_CHECK(device.is_cuda() || pose_ != nullptr, "they need tensors on a CUDA device, got ", device);
    const c10::DeviceGuard guard(device);
    call.device = facts_of(device);
    call.stream = current_stream(device, pose_ != nullptr);
    call.held = settings.held;
    choose_ = settings.choose;
    call.hooks = {this, allocate, choose_ != nullptr ? choose : nullptr, pose_ != nullptr ? launch : nullptr};
    failed = library->call(&call);
  } catch (const c10::Error &error) {
    throw std::runtime_error(described() + error.what_without_backtrace());
  }
  while (!workspaces_.empty()) { // the stream keeps them from others until the kernels have run
    workspaces_.pop_back();
    if (recorded())
      kept([&] {
        const py::gil_scoped_acquire gil;
        pose_->record(py::make_tuple("free"));
      });
  }
  if (error_ != nullptr)
    std::rethrow_exception(error_);
  if (failed != 0)
    throw std::runtime_error(described() + library->error());
}

// Runs a hook, whose exceptions do not pass through the C interface.
template <class Function> bool Session::kept(Function function) noexcept {
  try {
    function();
    return true;
  } catch (...) {
    error_ = std::current_exception();
    return false;
  }
}

uint64_t Session::allocate(void *self, int64_t bytes) {
  auto &session = *static_cast<Session *>(self);
  uint64_t address = 0;
  const bool taken = session.kept([&] {
    // By the caching allocator, on the stream in use: it may be given away when this call has queued its kernels.
    const auto options = session.operands_[0].options().dtype(at::kByte).requires_grad(false);
    const Tensor &made = session.workspaces_.emplace_back(at::empty({std::max<int64_t>(1, bytes)}, options));
    address = reinterpret_cast<uint64_t>(made.mutable_data_ptr());
    if (session.recorded()) {
      const py::gil_scoped_acquire gil;
      session.pose_->record(py::make_tuple("allocate", bytes));
    }
  });
  return taken ? address : 0;
}

int32_t Session::choose(void *self, int32_t wgrad, const cuda::Work *work, int32_t space, cuda::Choice *choice) {
  auto &session = *static_cast<Session *>(self);
  return !session.kept([&] {
    const py::gil_scoped_acquire gil;
    const auto function = py::reinterpret_borrow<py::object>(session.choose_);
    const py::tuple found = function(wgrad != 0, work->rows, work->columns, work->depth, work->repeats, work->row_bytes,
                                     work->column_bytes, work->slowness, space);
    const auto number = [&](size_t place) { return found[place].cast<int32_t>(); };
    *choice = {{number(0), number(1), number(2), number(3)}, number(4), number(5)};
  });
}

int32_t Session::launch(void *self, const char *kernel, int32_t threads, const cuda::Launch *launch) {
  auto &session = *static_cast<Session *>(self);
  return !session.kept([&] {
    if (!session.recorded())
      return;
    const py::gil_scoped_acquire gil;
    std::vector<Tensor> tensors = session.operands_;
    tensors.insert(tensors.end(), session.written_.begin(), session.written_.end());
    tensors.insert(tensors.end(), session.workspaces_.begin(), session.workspaces_.end());
    const auto device = c10::impl::VirtualGuardImpl(session.operands_[0].device().type()).getDevice();
    const py::bytes params(static_cast<const char *>(launch->params), launch->params_bytes);
    session.pose_->record(
        py::make_tuple("launch", kernel, py::make_tuple(launch->grid[0], launch->grid[1], launch->grid[2]), threads,
                       launch->shared_bytes, reinterpret_cast<uint64_t>(launch->stream), device, params, tensors));
  });
}

} // namespace rl_kernels::cuda_ops
