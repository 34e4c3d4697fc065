#include "wgrad.h"

#include "../finish_params.h"
#include "heuristics.h"

#include <algorithm>

namespace rl_kernels::cuda::host {
namespace {

constexpr int64_t MIN_ROWS = 64;       // pixels that one block of a sum over dy has, at least
constexpr int64_t MAX_SUM_SPLITS = 32; // shares of that sum, at most
constexpr int64_t BLOCKS_AT_ONCE = 2;  // on a multiprocessor

// What a product leaves for the end.
struct Dots {
  uint64_t address = 0;
  int64_t parts = 0;
};

class Differentiation {
public:
  Differentiation(const Call &call, const Meeting &meeting, Plan &plan)
      : call_(call), meeting_(meeting), plan_(plan), groups_(call.groups), out_(call.activation.sizes[1]),
        features_(out_ / groups_), channels_(call.x.sizes[1] / groups_), columns_(meeting.all_taps() * channels_),
        pixels_(out_ == 0 ? 0 : numel(call.activation) / out_), per_channel_(call.coefficients.dims == 2) {}

  void products() {
    const Choice choice = choose_tiles();
    const Configuration &c = choice.configuration;
    const int64_t across = cdiv(columns_, c.columns), tiles = cdiv(features_, c.rows) * across;
    if (call_.wants_coefficients) {
      dots_.parts = per_channel_ ? across : tiles * groups_;
      dots_.address = plan_.workspace(int64_t(sizeof(float)) * call_.sources * dots_.parts * (per_channel_ ? out_ : 1));
    }
    uint64_t partial = 0;
    if (choice.splits > 1)
      partial = plan_.workspace(int64_t(sizeof(float)) * choice.splits * out_ * columns_);
    const Wgrad params = params_of(choice, partial);
    const Name kernel = named("wgrad_", c);
    const LaunchFacts &facts = kernel.facts();
    plan_.add(kernel.number(), {tiles, groups_, choice.splits},
              std::max<int64_t>(int64_t(c.stages) * facts.stage_bytes, facts.epilogue_bytes), params);
    if (choice.splits > 1)
      plan_.add(named("wgrad_reduce_", c).number(), {tiles, groups_}, 0, params);
  }

  // The gradients of coefficients and biases.
  void finish() {
    const bool sums = call_.wants_biases != 0 || (call_.wants_coefficients && call_.biased);
    Finish p = {};
    if (sums)
      sum_channels(p);
    p.dots = dots_.address;
    p.parts = int32_t(dots_.parts);
    p.coefficients = call_.coefficients.address;
    p.source_stride = call_.coefficients.strides[0];
    p.channel_stride = per_channel_ ? call_.coefficients.strides[1] : 0;
    p.coefficient_gradients = call_.wants_coefficients ? call_.coefficient_gradients.address : 0;
    for (int j = 0; j < call_.sources && call_.biased; ++j) {
      p.biases[j] = call_.biases[j].address;
      p.bias_strides[j] = call_.biases[j].strides[0];
      p.bias_gradients[j] = call_.wants_biases >> j & 1 ? call_.bias_gradients[j].address : 0;
    }
    p.sources = call_.sources;
    p.channels = int32_t(out_);
    p.per_channel = per_channel_;
    p.totals = call_.wants_coefficients && !per_channel_ ? call_.sources : 0;
    const bool channels = call_.wants_biases != 0 || (call_.wants_coefficients && per_channel_);
    Name name;
    name << "finish_gradients_" << element_name(call_.element);
    const int64_t blocks = p.totals + (channels ? cdiv(out_, name.facts().threads) : 0);
    if (blocks > 0)
      plan_.add(name.number(), {blocks}, 0, p);
  }

private:
  Name named(const char *what, const Configuration &c) const {
    Name name;
    name << (call_.spatial == 0 ? "linear_" : "conv_") << what << c.rows << "x" << c.columns << "_"
         << element_name(call_.element);
    return name;
  }

  Choice choose_tiles() const {
    const int32_t bytes = call_.activation.bytes;
    const Work work = {features_, columns_, pixels_, groups_, bytes, bytes, slowness(call_.element)};
    return chosen(call_, true, work, call_.device.shared_bytes);
  }

  Wgrad params_of(const Choice &choice, uint64_t partial) const {
    const View &dy = call_.activation, &x = call_.x;
    const int64_t whole = meeting_.all_taps() > 1 ? channels_ : ANY;
    Wgrad p = {};
    p.recipe = recipe_of(call_, call_.weights, groups_, whole, false);
    View gradients[MAX_SOURCES] = {}; // those that are wanted
    for (int j = 0; j < call_.sources; ++j) {
      if ((call_.wants_weights >> j & 1) == 0)
        continue;
      const View &gradient = gradients[j] = call_.weight_gradients[j];
      p.gradients[j] = gradient.address;
      write_strides(p.gradient_strides[j], gradient);
      if (groups_ > 1)
        p.gradient_group_strides[j] = gradient.sizes[0] / groups_ * gradient.strides[0];
      p.wide |= int32_t(gradient.bytes != dy.bytes) << j;
    }
    p.dots = dots_.address;
    p.partial = partial;
    p.dy = dy.address;
    p.x = x.address;
    write_strides(p.dy_strides, dy);
    write_strides(p.x_strides, x);
    p.correlation = meeting_.with_channels(channels_);
    p.pixels = int32_t(pixels_);
    p.features = int32_t(features_);
    p.channels = int32_t(channels_);
    p.steps = choice.steps;
    p.splits = choice.splits;
    p.stages = choice.configuration.stages;
    p.groups = int32_t(groups_);
    p.vector_dy = is_vector(dy, groups_ > 1 ? features_ : ANY);
    p.vector_x = is_vector(x, groups_ > 1 ? channels_ : whole);
    // What is copied at once is as much of dW as of W, also where dW is float32.
    const bool apart = whole == ANY || whole % (COPIED_BYTES / dy.bytes) == 0;
    p.vector_gradients = apart ? vectors(gradients, call_.sources, whole) : 0;
    p.added = call_.added;
    p.per_channel = per_channel_;
    return p;
  }

  void sum_channels(Finish &finish) {
    const View &dy = call_.activation;
    if (out_ == 0)
      return;
    Name name;
    name << "finish_sums_" << element_name(call_.element);
    const int64_t blocks = cdiv(out_, name.facts().columns);
    const int64_t full = BLOCKS_AT_ONCE * call_.device.multiprocessors / blocks;
    int64_t splits = std::clamp<int64_t>(std::min(full, pixels_ / MIN_ROWS), 1, MAX_SUM_SPLITS);
    const int64_t rows = std::max<int64_t>(1, cdiv(pixels_, splits));
    splits = std::max<int64_t>(1, cdiv(pixels_, rows));
    ChannelSums p = {};
    p.dy = dy.address;
    p.sums = plan_.workspace(int64_t(sizeof(double)) * splits * out_);
    write_strides(p.dy_strides, dy);
    p.correlation = meeting_.with_channels(1);
    p.pixels = int32_t(pixels_);
    p.channels = int32_t(out_);
    p.rows = int32_t(rows);
    p.vector_dy = is_vector(dy);
    plan_.add(name.number(), {blocks, splits}, 0, p);
    finish.sums = p.sums;
    finish.splits = int32_t(splits);
  }

  const Call &call_;
  const Meeting &meeting_;
  Plan &plan_;
  const int64_t groups_, out_, features_, channels_, columns_, pixels_;
  const bool per_channel_;
  Dots dots_;
};

} // namespace

void differentiate(const Call &call, const Meeting &meeting, Plan &plan) {
  Differentiation asked(call, meeting, plan);
  if ((call.wants_weights != 0 || call.wants_coefficients) && numel(call.weights[0]) > 0)
    asked.products();
  if (call.wants_biases != 0 || call.wants_coefficients)
    asked.finish();
}

} // namespace rl_kernels::cuda::host
