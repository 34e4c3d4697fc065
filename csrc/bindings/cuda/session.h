// One call of the kernels' library: its stream, its workspaces, its errors.
#pragma once

#include "posing.h"

#include "cuda/abi.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <exception>
#include <memory>
#include <vector>

namespace rl_kernels::cuda_ops {

// How a call departs from what is usual.
struct Settings {
  // (wgrad, rows, columns, depth, repeats, row_bytes, column_bytes, slowness, space) -> (rows, columns, depth, stages,
  // splits, steps), instead of the choice by estimates; null where there is none.
  PyObject *choose = nullptr;
  cuda::Held held = {};
};

class Session {
public:
  // op: whose call this is; operands: those that it works on, the first of which says on which device.
  Session(const char *op, std::vector<at::Tensor> operands);

  // Queues the call's kernels on the current stream of the operands' device.
  void run(cuda::Call &call, const Settings &settings);

  // What the kernels write, for whoever records.
  void writes(const at::Tensor &tensor);

private:
  static uint64_t allocate(void *self, int64_t bytes);
  static int32_t choose(void *self, int32_t wgrad, const cuda::Work *work, int32_t space, cuda::Choice *choice);
  static int32_t launch(void *self, const char *kernel, int32_t threads, const cuda::Launch *launch);
  template <class Function> bool kept(Function function) noexcept;
  bool recorded() const { return pose_ != nullptr && !pose_->record.is_none(); }
  std::string described() const;

  const char *op_;
  std::vector<at::Tensor> operands_, written_, workspaces_;
  std::shared_ptr<const Pose> pose_;
  PyObject *choose_ = nullptr;
  std::exception_ptr error_; // what a hook threw
};

} // namespace rl_kernels::cuda_ops
