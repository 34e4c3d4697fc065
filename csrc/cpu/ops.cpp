#include "ops.h"

#include "kernels.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rl_kernels {
namespace {

using cpu::Kernels;

std::vector<const Kernels *> available() {
  std::vector<const Kernels *> found;
#if !defined(RL_KERNELS_SCALAR_ONLY)
  for (const Kernels *kernels : {cpu::kernels_avx512(), cpu::kernels_avx2()})
    if (kernels != nullptr)
      found.push_back(kernels);
#endif
  found.push_back(cpu::kernels_scalar());
  return found;
}

const Kernels &kernels() {
  static const Kernels &chosen = []() -> const Kernels & {
    const auto found = available();
    if (const char *wanted = std::getenv("RL_KERNELS_CPU_CAPABILITY"))
      for (const Kernels *kernels : found)
        if (std::strcmp(kernels->name, wanted) == 0)
          return *kernels;
    return *found.front();
  }();
  return chosen;
}

void *scratch(size_t bytes) {
  struct Release {
    void operator()(void *memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Release> memory;
  if (!memory)
    memory.reset(std::aligned_alloc(4096, cpu::scratch_bytes));
  TORCH_CHECK_WITH(OutOfMemoryError, memory && bytes <= cpu::scratch_bytes,
                   "no scratch memory for a thread: asked for ", bytes, " bytes");
  return memory.get();
}

// Work on so few multiplications is done before a second thread has woken up.
constexpr double serial_below = 1e6;

cpu::Team team(double multiplications) {
  const bool serial = multiplications < serial_below || at::in_parallel_region();
  return {serial ? 1 : at::get_num_threads(),
          [](int threads, void (*body)(void *, int), void *context) {
            if (threads == 1)
              return body(context, 0);
            at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t thread = begin; thread < end; ++thread)
                body(context, int(thread));
            });
          },
          scratch};
}

cpu::Type type_of(const at::Tensor &tensor) {
  switch (tensor.scalar_type()) {
  case at::kFloat:
    return cpu::Type::float32;
  case at::kDouble:
    return cpu::Type::float64;
  case at::kBFloat16:
    return cpu::Type::bfloat16;
  default:
    return cpu::Type::float16;
  }
}

bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Fresh memory costs a page fault every 4 KiB, which for a gradient takes longer than computing it, and the C library
// gives a large block back to the system each time it is freed. The gradients of large weights are therefore allocated
// in huge pages, where the system leaves these to the program: a fault every 2 MiB. Of what is freed, the last
// `kept_bytes` are kept for the next gradient of the same size, and left to the system should it run short.
class HugePages final : public c10::Allocator {
public:
  static constexpr size_t page = 2 << 20, kept_bytes = 256 << 20;

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes + page - 1) / page * page;
    void *memory = take(size);
    if (memory == nullptr) {
      memory = std::aligned_alloc(page, size);
      TORCH_CHECK_WITH(OutOfMemoryError, memory, "no memory for a gradient of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(memory, bytes / page * page, MADV_HUGEPAGE); // a hint: failing changes nothing
#endif
    }
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, new Block{this, memory, size}, &release, c10::Device(c10::kCPU)};
  }
  void copy_data(void *to, const void *from, size_t bytes) const override { std::memcpy(to, from, bytes); }

private:
  struct Block {
    HugePages *owner;
    void *memory;
    size_t size;
  };

  void *take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->size == size) {
        void *memory = block->memory;
        kept_.erase(block);
        kept_size_ -= size;
        return memory;
      }
    return nullptr;
  }
  void give_back(const Block &block) {
#if defined(__linux__) && defined(MADV_FREE)
    madvise(block.memory, block.size, MADV_FREE);
#endif
    std::vector<Block> oldest;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
      kept_size_ += block.size;
      while (kept_size_ > kept_bytes) {
        oldest.push_back(kept_.front());
        kept_size_ -= kept_.front().size;
        kept_.pop_front();
      }
    }
    for (const Block &freed : oldest)
      std::free(freed.memory);
  }
  static void release(void *context) {
    const std::unique_ptr<Block> block(static_cast<Block *>(context));
    c10::profiledCPUMemoryReporter().Delete(block->memory);
    block->owner->give_back(*block);
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t kept_size_ = 0;
};

at::Tensor empty_gradient(const at::Tensor &weight, at::MemoryFormat format) {
  static HugePages &huge_pages = *new HugePages; // outlives every tensor
  if (weight.nbytes() < HugePages::page || weight.nbytes() > HugePages::kept_bytes)
    return at::empty(weight.sizes(), weight.options().memory_format(format));
  return at::detail::empty_generic(weight.sizes(), &huge_pages, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   weight.scalar_type(), format);
}

// The strides of (out, in, taps) of a weight; false where the taps cannot be walked with one stride.
bool weight_strides(const at::Tensor &weight, int64_t &out, int64_t &in, int64_t &tap) {
  const auto sizes = weight.sizes();
  const auto strides = weight.strides();
  out = strides[0], in = strides[1], tap = 1;
  bool first = true;
  int64_t expected = 0;
  for (int64_t dim = weight.dim() - 1; dim >= 2; --dim) {
    if (sizes[dim] == 1)
      continue;
    if (first)
      tap = expected = strides[dim], first = false;
    else if (strides[dim] != expected)
      return false;
    expected *= sizes[dim];
  }
  return true;
}

const char *refuses(const at::Tensor &activation, const Tensors &weights) {
  if (!activation.device().is_cpu())
    return "runs on CPUs only";
  if (!is_served(activation.scalar_type()))
    return "serves float32, float64, bfloat16 and float16";
  if (weights.size() > size_t(cpu::max_sources))
    return "mixes at most 16 sources";
  return nullptr;
}

cpu::Recipe describe(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases) {
  cpu::Recipe recipe{};
  recipe.sources = int(weights.size());
  recipe.type = type_of(weights[0]);
  for (size_t j = 0; j < weights.size(); ++j) {
    recipe.weight[j] = weights[j].data_ptr();
    weight_strides(weights[j], recipe.out_stride[j], recipe.in_stride[j], recipe.tap_stride[j]);
    if (biases) {
      recipe.bias[j] = (*biases)[j].data_ptr();
      recipe.bias_stride[j] = (*biases)[j].stride(0);
    }
  }
  recipe.coefficients = coefficients.data_ptr();
  recipe.source_stride = coefficients.stride(0);
  recipe.channel_stride = coefficients.dim() == 2 ? coefficients.stride(1) : 0;
  return recipe;
}

// A (rows, features) view of an activation whose features lie side by side; a copy where they do not.
at::Tensor as_rows(const at::Tensor &tensor) {
  const int64_t features = tensor.size(-1);
  at::Tensor rows = tensor.dim() == 2 ? tensor : tensor.reshape({features ? tensor.numel() / features : 0, features});
  return rows.stride(1) == 1 || features == 1 ? rows : rows.contiguous();
}

cpu::Linear describe_linear(const at::Tensor &rows, const Tensors &weights, const at::Tensor &coefficients,
                            const Biases &biases) {
  cpu::Linear problem{};
  problem.type = type_of(rows);
  problem.m = rows.size(0), problem.n = weights[0].size(0), problem.k = weights[0].size(1);
  problem.recipe = describe(weights, coefficients, biases);
  return problem;
}

// With few rows reading the sources takes as long as some multiplications would.
double multiplications(const cpu::Linear &problem) {
  return double(std::max(problem.m, cpu::few_rows)) * double(problem.n) * double(problem.k);
}

at::Tensor empty_like_activation(const at::Tensor &activation, int64_t features) {
  at::DimVector sizes(activation.sizes());
  sizes.back() = features;
  return at::empty(sizes, activation.options());
}

// The outputs of a wgrad, allocated; what is not wanted is empty. Returns the pointers for the kernels.
cpu::Gradients allocate(Gradients &outputs, const Tensors &weights, const at::Tensor &coefficients,
                        const Biases &biases, const Wanted &wanted, at::MemoryFormat format) {
  auto &[dweights, dcoefficients, dbiases] = outputs;
  cpu::Gradients gradients{};
  gradients.in_stride = gradients.tap_stride = 1;
  const auto nothing = [](const at::Tensor &like) { return at::empty({0}, like.options()); };
  for (size_t j = 0; j < weights.size(); ++j) {
    if (!wanted.weights[j]) {
      dweights.push_back(nothing(weights[j]));
      continue;
    }
    dweights.push_back(empty_gradient(weights[j], format));
    gradients.weight[j] = dweights.back().data_ptr();
    weight_strides(dweights.back(), gradients.out_stride, gradients.in_stride, gradients.tap_stride);
  }
  dcoefficients = wanted.coefficients ? at::empty(coefficients.sizes(), coefficients.options()) : nothing(coefficients);
  gradients.coefficients = wanted.coefficients ? dcoefficients.data_ptr() : nullptr;
  gradients.per_channel = coefficients.dim() == 2;
  if (biases)
    for (size_t j = 0; j < biases->size(); ++j) {
      const auto &bias = (*biases)[j];
      dbiases.push_back(wanted.biases[j] ? at::empty(bias.sizes(), bias.options()) : nothing(bias));
      gradients.bias[j] = wanted.biases[j] ? dbiases.back().data_ptr() : nullptr;
    }
  return gradients;
}

size_t element_bytes(const cpu::Recipe &recipe) { return recipe.type == cpu::Type::float64 ? 8 : 4; }

} // namespace

at::MemoryFormat memory_format(const at::Tensor &activation, const Tensors &weights) {
  const auto format = activation.suggest_memory_format();
  return format != at::MemoryFormat::Contiguous ? format : weights[0].suggest_memory_format();
}

const char *refuses_linear(const at::Tensor &activation, const Tensors &weights) {
  return refuses(activation, weights);
}

namespace {

// The kernels multiply bfloat16 in float32; where the CPU has instructions for it, the vendor's products are twice as
// fast, which repays streamed's second pass over a panel once the panel meets enough rows.
const char *slower_in_bfloat16(const at::Tensor &activation, int64_t rows) {
#if defined(__x86_64__)
  static const bool native = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool native = false;
#endif
  return native && rows > 384 && activation.scalar_type() == at::kBFloat16 ? "bfloat16 on many rows" : nullptr;
}

} // namespace

const char *slower_linear(const at::Tensor &activation, const Tensors &) {
  const int64_t features = activation.size(-1);
  return slower_in_bfloat16(activation, features ? activation.numel() / features : 0);
}

at::Tensor mixed_linear(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients,
                        const Biases &biases) {
  at::Tensor y = empty_like_activation(x, weights[0].size(0));
  if (y.numel() == 0)
    return y;
  const at::Tensor rows = as_rows(x);
  cpu::Linear problem = describe_linear(rows, weights, coefficients, biases);
  problem.x = rows.data_ptr();
  problem.x_stride = rows.stride(0);
  problem.out = y.data_ptr();
  problem.m = y.numel() / problem.n;
  kernels().linear_forward(problem, team(multiplications(problem)));
  return y;
}

at::Tensor mixed_linear_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients) {
  at::Tensor dx = empty_like_activation(dy, weights[0].size(1));
  if (dx.numel() == 0)
    return dx;
  if (weights[0].size(0) == 0)
    return dx.zero_();
  const at::Tensor rows = as_rows(dy);
  cpu::Linear problem = describe_linear(rows, weights, coefficients, std::nullopt);
  problem.dy = rows.data_ptr();
  problem.dy_stride = rows.stride(0);
  problem.out = dx.data_ptr();
  kernels().linear_dgrad(problem, team(multiplications(problem)));
  return dx;
}

namespace {

// wgrad, and dgrad as well where dx is given: in one pass over the sources where that is faster.
Gradients linear_backward(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                          const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted, at::Tensor *dx) {
  Gradients outputs;
  const at::Tensor rows = as_rows(x), rows_dy = as_rows(dy);
  cpu::Linear problem = describe_linear(rows, weights, coefficients, biases);
  problem.gradients = allocate(outputs, weights, coefficients, biases, wanted, at::MemoryFormat::Contiguous);
  problem.m = problem.n ? dy.numel() / problem.n : 0;
  problem.x = rows.data_ptr();
  problem.x_stride = rows.stride(0);
  problem.dy = rows_dy.data_ptr();
  problem.dy_stride = rows_dy.stride(0);
  const cpu::Team threads = team(multiplications(problem));
  const at::Tensor dots = at::zeros(
      {cpu::linear_dots(problem.n, problem.k, problem.recipe.sources, element_bytes(problem.recipe), threads.threads)},
      at::kDouble);
  problem.dots = dots.data_ptr<double>();
  if (dx != nullptr && problem.m > 0 && problem.m <= cpu::few_rows && weights[0].numel() > 0) {
    *dx = empty_like_activation(dy, problem.k);
    problem.out = dx->data_ptr();
    if (kernels().linear_backward(problem, threads))
      return outputs;
  }
  kernels().linear_wgrad(problem, threads);
  if (dx != nullptr)
    *dx = mixed_linear_dgrad(dy, weights, coefficients);
  return outputs;
}

} // namespace

Gradients mixed_linear_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                             const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted) {
  return linear_backward(dy, x, weights, coefficients, biases, wanted, nullptr);
}

std::pair<at::Tensor, Gradients> mixed_linear_backward(const at::Tensor &dy, const at::Tensor &x,
                                                       const Tensors &weights, const at::Tensor &coefficients,
                                                       const Biases &biases, const Wanted &wanted) {
  at::Tensor dx;
  Gradients gradients = linear_backward(dy, x, weights, coefficients, biases, wanted, &dx);
  return {dx, gradients};
}

namespace {

cpu::Volume volume(const at::Tensor &tensor) {
  cpu::Volume result{tensor.size(1), {1, 1, 1}, tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  const int64_t spatial = tensor.dim() - 2;
  for (int64_t d = 0; d < spatial; ++d) {
    result.size[3 - spatial + d] = tensor.size(2 + d);
    result.stride[3 - spatial + d] = tensor.stride(2 + d);
  }
  return result;
}

// The same volume as one line of pixels, where its lines follow one another: what a pointwise convolution may do.
cpu::Volume flattened(cpu::Volume volume) {
  const bool follows = (volume.size[1] == 1 || volume.stride[1] == volume.size[2] * volume.stride[2]) &&
                       (volume.size[0] == 1 || volume.stride[0] == volume.size[1] * volume.size[2] * volume.stride[2]);
  return follows ? cpu::Volume{volume.channels,
                               {1, 1, volume.size[0] * volume.size[1] * volume.size[2]},
                               volume.batch_stride,
                               volume.channel_stride,
                               {0, 0, volume.stride[2]}}
                 : volume;
}

std::vector<int64_t> output_size(const at::Tensor &x, const at::Tensor &weight, const Geometry &geometry) {
  std::vector<int64_t> sizes{x.size(0), weight.size(0)};
  for (size_t d = 0; d < geometry.stride.size(); ++d) {
    const int64_t extent = geometry.dilation[d] * (weight.size(2 + int64_t(d)) - 1) + 1;
    sizes.push_back((x.size(2 + int64_t(d)) + 2 * geometry.padding[d] - extent) / geometry.stride[d] + 1);
  }
  return sizes;
}

cpu::Conv describe_conv(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
  cpu::Conv problem{};
  problem.type = type_of(activation);
  problem.batch = activation.size(0);
  problem.groups = geometry.groups;
  const size_t spatial = geometry.stride.size();
  for (size_t d = 0; d < 3; ++d) {
    const bool present = d + spatial >= 3;
    const size_t i = d + spatial - 3;
    problem.kernel[d] = present ? weight.size(2 + int64_t(i)) : 1;
    problem.stride[d] = present ? geometry.stride[i] : 1;
    problem.padding[d] = present ? geometry.padding[i] : 0;
    problem.dilation[d] = present ? geometry.dilation[i] : 1;
  }
  return problem;
}

double multiplications(const at::Tensor &y, const at::Tensor &weight) {
  return weight.size(0) ? double(y.numel()) * double(weight.numel()) / double(weight.size(0)) : 0;
}

// A tensor (batch, channels, *spatial) as (pixels, channels), where that is a view.
std::optional<at::Tensor> as_pixels(const at::Tensor &tensor) {
  if (tensor.stride(1) != 1 && tensor.size(1) != 1)
    return std::nullopt;
  int64_t pixel = -1, expected = 0;
  for (int64_t i = tensor.dim() - 1; i >= 1; --i) {
    const int64_t dim = i == 1 ? 0 : i; // the innermost spatial dimension first, the batch last
    if (tensor.size(dim) == 1)
      continue;
    if (pixel < 0)
      pixel = expected = tensor.stride(dim);
    else if (tensor.stride(dim) != expected)
      return std::nullopt;
    expected *= tensor.size(dim);
  }
  const int64_t channels = tensor.size(1);
  return tensor.as_strided({tensor.numel() / channels, channels}, {pixel < 0 ? channels : pixel, 1});
}

// Describes x and y, or their gradients.
void set_volumes(cpu::Conv &problem, const at::Tensor &x, const at::Tensor &y, bool pointwise) {
  problem.x = volume(x), problem.y = volume(y);
  if (!pointwise)
    return;
  const cpu::Volume flat_x = flattened(problem.x), flat_y = flattened(problem.y);
  if (flat_x.size[2] == flat_y.size[2])
    problem.x = flat_x, problem.y = flat_y;
}

// A convolution of kernel 1 and stride 1 is a linear layer over pixels.
bool is_pointwise(const at::Tensor &weight, const Geometry &geometry) {
  if (geometry.groups != 1)
    return false;
  for (size_t d = 0; d < geometry.stride.size(); ++d)
    if (weight.size(2 + int64_t(d)) != 1 || geometry.stride[d] != 1 || geometry.padding[d] != 0)
      return false;
  return true;
}

} // namespace

const char *refuses_conv(const at::Tensor &activation, const Tensors &weights, const Geometry &geometry) {
  if (const char *reason = refuses(activation, weights))
    return reason;
  int64_t out, in, tap;
  for (const auto &weight : weights)
    if (!weight_strides(weight, out, in, tap))
      return "reads the taps of a filter with one stride";
  cpu::Conv problem = describe_conv(activation, weights[0], geometry);
  problem.x.channels = weights[0].size(1) * geometry.groups;
  problem.y.channels = weights[0].size(0);
  return kernels().conv_fits(problem) ? nullptr : "a filter's piece outgrows its scratch";
}

namespace {

// Few channels a group leave the kernels' vectors half empty.
bool narrow_groups(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
  return geometry.groups > 1 && weight.size(0) / geometry.groups < (activation.scalar_type() == at::kDouble ? 8 : 16);
}

// Filters of few channels a group are small: up to this size one is mixed whole, for the vendor's convolution.
constexpr int64_t whole_filter_bytes = 1 << 20;

// The vendor's convolution on a filter mixed here, in float32.
class WholeFilter {
public:
  static bool serves(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
    return narrow_groups(activation, weight, geometry) && int64_t(weight.nbytes()) <= whole_filter_bytes &&
           activation.scalar_type() == at::kFloat && activation.numel() != 0 && weight.numel() != 0;
  }

  WholeFilter(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases, const Geometry &geometry)
      : geometry_(geometry), output_padding_(geometry.stride.size(), 0), filter_(empty(weights[0])) {
    const at::Tensor &weight = weights[0];
    if (biases)
      bias_ = at::empty({weight.size(0)}, weight.options());
    cpu::Conv problem = describe_conv(weight, weight, geometry);
    problem.recipe = describe(weights, coefficients, biases);
    problem.x.channels = weight.size(1) * geometry.groups, problem.y.channels = weight.size(0);
    problem.out = filter_.data_ptr();
    kernels().conv_mix(problem, biases ? bias_.data_ptr() : nullptr, team(double(weight.numel())));
  }

  at::Tensor forward(const at::Tensor &x) const {
    const std::optional<at::Tensor> bias = bias_.defined() ? std::optional(bias_) : std::nullopt;
    return at::convolution(x, filter_, bias, geometry_.stride, geometry_.padding, geometry_.dilation, false,
                           output_padding_, geometry_.groups);
  }

  // As a convolution transposed: that needs no stand-in for x, which the vendor would copy.
  at::Tensor dgrad(const at::Tensor &dy, const std::vector<int64_t> &input_size) const {
    std::vector<int64_t> output_padding;
    for (size_t d = 0; d < geometry_.stride.size(); ++d)
      output_padding.push_back(input_size[d + 2] -
                               ((dy.size(int64_t(d) + 2) - 1) * geometry_.stride[d] - 2 * geometry_.padding[d] +
                                geometry_.dilation[d] * (filter_.size(int64_t(d) + 2) - 1) + 1));
    return at::convolution(dy, filter_, std::nullopt, geometry_.stride, geometry_.padding, geometry_.dilation, true,
                           output_padding, geometry_.groups);
  }

  // G, laid out as the kernels' conv_mix lays the filter out.
  static at::Tensor wgrad(const at::Tensor &dy, const at::Tensor &x, const at::Tensor &weight,
                          const Geometry &geometry) {
    const at::Tensor like = empty(weight);
    const std::vector<int64_t> output_padding(geometry.stride.size(), 0);
    const at::Tensor g = std::get<1>(at::convolution_backward(dy, x, like, std::nullopt, geometry.stride,
                                                              geometry.padding, geometry.dilation, false,
                                                              output_padding, geometry.groups, {false, true, false}));
    return g.strides() == like.strides() ? g : like.copy_(g);
  }

private:
  // A filter whose rows lie as those of the recipe do.
  static at::Tensor empty(const at::Tensor &weight) {
    int64_t out, in, tap;
    weight_strides(weight, out, in, tap);
    const int64_t channels = weight.size(1), taps = weight.numel() / (weight.size(0) * channels);
    at::DimVector sizes(weight.sizes());
    if (taps == 1 || in != 1 || tap != channels)
      return at::empty(sizes, weight.options());
    sizes.erase(sizes.begin() + 1);
    sizes.push_back(channels);
    return at::empty(sizes, weight.options()).movedim(-1, 1);
  }

  const Geometry &geometry_;
  std::vector<int64_t> output_padding_;
  at::Tensor filter_, bias_;
};

} // namespace

const char *slower_conv(const at::Tensor &activation, const Tensors &weights, const Geometry &geometry) {
  if (narrow_groups(activation, weights[0], geometry) && !WholeFilter::serves(activation, weights[0], geometry))
    return "few channels a group";
  const int64_t channels = activation.size(1);
  return slower_in_bfloat16(activation, channels ? activation.numel() / channels : 0);
}

at::Tensor mixed_conv(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients, const Biases &biases,
                      const Geometry &geometry) {
  const auto &weight = weights[0];
  const auto format = memory_format(x, weights);
  if (WholeFilter::serves(x, weight, geometry))
    return WholeFilter(weights, coefficients, biases, geometry).forward(x).contiguous(format);
  at::Tensor y = at::empty(output_size(x, weight, geometry), x.options().memory_format(format));
  if (y.numel() == 0)
    return y;
  const cpu::Team threads = team(multiplications(y, weight));
  if (is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(x), out = as_pixels(y);
    if (pixels && out && out->is_contiguous()) {
      cpu::Linear problem{};
      problem.type = type_of(x);
      problem.m = pixels->size(0), problem.n = weight.size(0), problem.k = weight.size(1);
      problem.recipe = describe(weights, coefficients, biases);
      problem.x = pixels->data_ptr();
      problem.x_stride = pixels->stride(0);
      problem.out = y.data_ptr();
      kernels().linear_forward(problem, threads);
      return y;
    }
  }
  cpu::Conv problem = describe_conv(x, weight, geometry);
  problem.recipe = describe(weights, coefficients, biases);
  set_volumes(problem, x, y, is_pointwise(weight, geometry));
  problem.input = x.data_ptr();
  problem.out = y.data_ptr();
  kernels().conv_forward(problem, threads);
  return y;
}

at::Tensor mixed_conv_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients,
                            const std::vector<int64_t> &input_size, const Geometry &geometry) {
  const auto &weight = weights[0];
  const auto format = memory_format(dy, weights);
  if (WholeFilter::serves(dy, weight, geometry))
    return WholeFilter(weights, coefficients, std::nullopt, geometry).dgrad(dy, input_size).contiguous(format);
  at::Tensor dx = at::empty(input_size, dy.options().memory_format(format));
  if (dx.numel() == 0)
    return dx;
  if (dy.numel() == 0)
    return dx.zero_();
  const cpu::Team threads = team(multiplications(dy, weight));
  if (is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(dy), out = as_pixels(dx);
    if (pixels && out && out->is_contiguous()) {
      cpu::Linear problem{};
      problem.type = type_of(dy);
      problem.m = pixels->size(0), problem.n = weight.size(0), problem.k = weight.size(1);
      problem.recipe = describe(weights, coefficients, std::nullopt);
      problem.dy = pixels->data_ptr();
      problem.dy_stride = pixels->stride(0);
      problem.out = dx.data_ptr();
      kernels().linear_dgrad(problem, threads);
      return dx;
    }
  }
  cpu::Conv problem = describe_conv(dy, weight, geometry);
  problem.recipe = describe(weights, coefficients, std::nullopt);
  set_volumes(problem, dx, dy, is_pointwise(weight, geometry));
  problem.input = dy.data_ptr();
  problem.out = dx.data_ptr();
  kernels().conv_dgrad(problem, threads);
  return dx;
}

Gradients mixed_conv_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                           const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted,
                           const Geometry &geometry) {
  const auto &weight = weights[0];
  Gradients outputs;
  const cpu::Gradients gradients = allocate(outputs, weights, coefficients, biases, wanted, memory_format(x, weights));
  if (weight.numel() == 0 || dy.numel() == 0) {
    for (auto *list : {&std::get<0>(outputs), &std::get<2>(outputs)})
      for (auto &gradient : *list)
        gradient.zero_();
    std::get<1>(outputs).zero_();
    // Without input channels the biases' gradients remain.
    if (dy.numel() == 0 || !biases)
      return outputs;
  }
  const cpu::Team threads = team(multiplications(dy, weight));
  if (weight.numel() != 0 && is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(x), pixels_dy = as_pixels(dy);
    if (pixels && pixels_dy) {
      cpu::Linear problem{};
      problem.type = type_of(x);
      problem.m = pixels->size(0), problem.n = weight.size(0), problem.k = weight.size(1);
      problem.recipe = describe(weights, coefficients, biases);
      problem.gradients = gradients;
      problem.x = pixels->data_ptr();
      problem.x_stride = pixels->stride(0);
      problem.dy = pixels_dy->data_ptr();
      problem.dy_stride = pixels_dy->stride(0);
      const at::Tensor dots = at::zeros({cpu::linear_dots(problem.n, problem.k, problem.recipe.sources,
                                                          element_bytes(problem.recipe), threads.threads)},
                                        at::kDouble);
      problem.dots = dots.data_ptr<double>();
      kernels().linear_wgrad(problem, threads);
      return outputs;
    }
  }
  cpu::Conv problem = describe_conv(x, weight, geometry);
  problem.recipe = describe(weights, coefficients, biases);
  problem.gradients = gradients;
  set_volumes(problem, x, dy, is_pointwise(weight, geometry));
  problem.input = x.data_ptr();
  problem.dy = dy.data_ptr();
  const at::Tensor dots = at::zeros({(problem.recipe.sources + 1) * problem.y.channels}, at::kDouble);
  problem.dots = dots.data_ptr<double>();
  at::Tensor product, partials;
  if (WholeFilter::serves(x, weight, geometry)) {
    product = WholeFilter::wgrad(dy, x, weight, geometry);
    problem.product = product.data_ptr();
  } else {
    partials = at::empty({kernels().conv_partials(problem, threads.threads)}, at::kByte);
    problem.partials = partials.data_ptr();
  }
  kernels().conv_wgrad(problem, threads);
  return outputs;
}

std::string capability() { return kernels().name; }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels *kernels : available())
    names.emplace_back(kernels->name);
  return names;
}

int64_t workspace_bytes_a_thread() { return int64_t(cpu::scratch_bytes); }

} // namespace rl_kernels
