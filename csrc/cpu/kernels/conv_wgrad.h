// Convolutions' wgrad: G (output channels, runs of taps and input channels) is summed in scratch, over the pixels of
// every image.
#pragma once

#include "conv.h"
#include "conv_phase.h"
#include "conv_strip.h"
#include "gradients.h"
#include "mix.h"
#include "pack.h"
#include "parallel.h"
#include "problem.h"
#include "tile.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

// How G is cut: `rows` output channels an item; in `splits` shares of the pixels where the items are too few. Where
// there are few channels, the taps along the width are one run, over a padded strip.
struct WgradPlan {
  bool merged;
  int64_t run, run_pitch, pitch, rows, items, splits;
  OuterShape shape;
};

constexpr int64_t max_gradient_bytes = 5 << 18, max_outer_bytes = 1 << 19;
constexpr int64_t summed_at_once = 128; // pixels, before they join the sum over all

template <class T> WgradPlan plan_wgrad(const Conv &p, const Phase &phase, int threads) {
  const Phase::Dimension &broad = phase.dimension[2];
  const int64_t channels = p.x.channels / p.groups, out = p.y.channels / p.groups;
  WgradPlan plan;
  plan.merged = channels < 2 * width<T> && broad.taps > 1 && broad.consecutive();
  plan.run = plan.merged ? broad.taps * channels : channels;
  plan.run_pitch = round_up(plan.run, width<T>);
  plan.pitch = phase.taps() * channels / max(1, plan.run) * plan.run_pitch;
  plan.shape = outer_shape<T>(out, plan.run);
  const int64_t rows = plan.shape.rows;
  const int64_t fit = max(rows, max_gradient_bytes / max(1, plan.pitch * int64_t(sizeof(T))) / rows * rows);
  const int64_t shares = cut<T>(phase, p.batch, channels, true, threads).count;
  const int64_t count = block_count(out, min(fit, 256 / rows * rows), 8 * rows, ceil_div(threads, p.groups));
  plan.rows = round_up(ceil_div(out, count), rows);
  plan.items = ceil_div(out, plan.rows) * p.groups;
  plan.splits = 1;
  if (plan.items < threads) {
    // Too few items: the pixels are shared out, and the partial sums added in order.
    plan.rows = min(round_up(out, rows), fit);
    plan.items = ceil_div(out, plan.rows) * p.groups;
    const bool cheap_to_add = plan.rows * plan.pitch * int64_t(sizeof(T)) <= 1 << 16;
    plan.splits = max(1, min(shares, cheap_to_add ? 4 * threads : threads));
  }
  return plan;
}

template <class T> int64_t conv_partials(const Conv &p, int threads) {
  Phase phase;
  forward_phase(p, phase);
  const WgradPlan plan = plan_wgrad<T>(p, phase, threads);
  return plan.splits == 1 ? 0 : plan.splits * plan.items * plan.rows * plan.pitch * int64_t(sizeof(T));
}

// Packs dy at a block's pixels, for n output channels from o on, as the broadcast operand.
template <class T, class X>
void pack_outer_block(int rows, const X *dy, const Volume &y, const Block &block, int64_t o, int64_t n, T *to) {
  const int64_t steps = block.pixels();
  const X *corner = dy + block.image * y.batch_stride + o * y.channel_stride + block.depth * y.stride[0];
  for (int64_t image = 0; image < block.images; ++image)
    for (int64_t h = block.lines.begin; h < block.lines.end; ++h) {
      const X *line = corner + image * y.batch_stride + h * y.stride[1] + block.columns.begin * y.stride[2];
      const int64_t k = block.number(image, h, block.columns.begin);
      if (y.channel_stride == 1)
        for (int64_t w = 0; w < block.columns.size(); ++w)
          pack_outer(rows, line + w * y.stride[2], n, k + w, steps, to);
      else
        for (int64_t i = 0; i < round_up(n, rows); ++i) {
          T *column = to + (i / rows * steps + k) * rows + i % rows;
          for (int64_t w = 0; w < block.columns.size(); ++w)
            column[w * rows] = i < n ? load_one(line + i * y.channel_stride + w * y.stride[2]) : T(0);
        }
    }
}

// The sums of dy over all but its channels, in double, for n channels from o on; n is a vector's width at most.
template <class X> void sum_channels(const X *dy, const Volume &y, int64_t batch, int64_t o, int64_t n, double *sums) {
  using T = Accumulate<X>;
  double lanes[width<T>] = {};
  const auto add = [&](const X *at, int64_t some) {
    const Vector<T> v = some == width<T> ? load(at) : load_part(at, some);
    for (int l = 0; l < width<T>; ++l)
      lanes[l] += double(v[l]);
  };
  const auto each_line = [&](int64_t channel, const auto &body) {
    for (int64_t image = 0; image < batch; ++image)
      for (int64_t d = 0; d < y.size[0]; ++d)
        for (int64_t h = 0; h < y.size[1]; ++h)
          body(dy + image * y.batch_stride + channel * y.channel_stride + d * y.stride[0] + h * y.stride[1]);
  };
  if (y.channel_stride == 1) {
    each_line(o, [&](const X *line) {
      for (int64_t w = 0; w < y.size[2]; ++w)
        add(line + w * y.stride[2], n);
    });
    for (int64_t i = 0; i < n; ++i)
      sums[i] = lanes[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    double rest = 0;
    for (int l = 0; l < width<T>; ++l)
      lanes[l] = 0;
    each_line(o + i, [&](const X *line) {
      int64_t w = 0;
      for (; y.stride[2] == 1 && w + width<T> <= y.size[2]; w += width<T>)
        add(line + w, width<T>);
      for (; w < y.size[2]; ++w)
        rest += double(load_one(line + w * y.stride[2]));
    });
    for (int l = 0; l < width<T>; ++l)
      rest += lanes[l];
    sums[i] = rest;
  }
}

// Sums G and finishes every gradient from it.
template <class S, class X> class ConvWgrad {
public:
  using T = Accumulate<X>;

  ConvWgrad(const Conv &p, const Phase &phase, const Team &team)
      : p_(p), phase_(phase), team_(team), taps_(tap_count(p)), channels_(p.x.channels / p.groups),
        out_(p.y.channels / p.groups), recipe_(p.recipe, channels_, taps_),
        blocks_(cut<T>(phase, p.batch, channels_, true, team.threads)), plan_(plan_wgrad<T>(p, phase, team.threads)),
        size_(plan_.rows * plan_.pitch), merged_(plan_.merged ? broad().taps : 1) {}

  void run() const {
    const bool needs_dots = wants_dots(p_.gradients);
    if (needs_dots || wants_weights(p_.gradients, p_.recipe.sources)) {
      if (p_.product != nullptr) {
        share_to_finish(p_.y.channels, [&](int64_t o, double *columns) {
          finish_channel(o, static_cast<const T *>(p_.product) + o * recipe_.row_size(), columns);
        });
      } else if (plan_.splits == 1) {
        share_to_finish(plan_.items, [&](int64_t item, double *columns) { compute(item, columns); });
      } else {
        share(team_, plan_.items * plan_.splits, [&](int64_t item) { compute(item, nullptr); });
        share_to_finish(p_.y.channels, [&](int64_t channel, double *columns) { add_shares(channel, columns); });
      }
    }
    if (wants_channel_sums(p_.gradients, p_.recipe)) {
      double *sums = p_.dots + recipe_.dots() * p_.y.channels;
      share(team_, ceil_div(p_.y.channels, width<T>), [&](int64_t item) {
        const int64_t o = item * width<T>;
        sum_channels(static_cast<const X *>(p_.dy), p_.y, p_.batch, o, min(width<T>, p_.y.channels - o), sums + o);
      });
      finish_biases(recipe_, p_.recipe, p_.gradients, p_.y.channels, sums,
                    needs_dots && !recipe_.is_outer() ? p_.dots : nullptr);
    }
    if (needs_dots && recipe_.is_outer())
      finish_outer_coefficients(recipe_, p_.gradients, p_.y.channels, {p_.dots, p_.y.channels, p_.columns},
                                team_.threads, team_);
    else if (needs_dots)
      finish_coefficients<T>(p_.gradients, p_.recipe.sources, p_.y.channels, p_.dots);
  }

private:
  // Calls body(item, nullptr) for items that finish channels or, with Outer coefficients, body(item, columns): in as
  // many runs as there are threads, the items of each in order, for each of which the sums of right's gradient are
  // kept.
  template <class Body> void share_to_finish(int64_t count, const Body &body) const {
    if (!wants_dots(p_.gradients) || !recipe_.is_outer())
      return share(team_, count, [&](int64_t item) { body(item, nullptr); });
    share(team_, team_.threads, [&](int64_t run) {
      for (int64_t item = count * run / team_.threads; item < count * (run + 1) / team_.threads; ++item)
        body(item, p_.columns + run * recipe_.dots() * recipe_.row_size());
    });
  }

  // Where an item's pixels are, and what of G it sums: output channels o..o+n of a group.
  struct Part {
    int64_t group, o, n;
    T *g;
    T *dy; // packed
    bool padded;
  };

  // One item: the sums over its share of the pixels, finished where there are no other shares.
  __attribute__((noinline)) void compute(int64_t item, double *columns) const {
    Scratch scratch(team_);
    T *g = scratch.take<T>(size_);
    T *copy = scratch.take<T>(max_strip_bytes / int64_t(sizeof(T)) + width<T>);
    T *dy = scratch.take<T>(max_outer_bytes / int64_t(sizeof(T)));
    T *row = scratch.take<T>(recipe_.row_size());
    const int64_t share = item % plan_.splits, group = item / plan_.splits % p_.groups;
    const int64_t o = item / plan_.splits / p_.groups * plan_.rows;
    if (plan_.splits > 1)
      g = partials(group, o) + share * size_;
    for (int64_t l = 0; l < size_; l += width<T>)
      store(g + l, Vector<T>{});
    // A vector that reaches past the last channel reads what follows: only a strip has room for that.
    const bool padded = plan_.merged || plan_.run != plan_.run_pitch;
    const Part part{group, o, min(plan_.rows, out_ - o), g, dy, padded};
    const int64_t begin = blocks_.count * share / plan_.splits, end = blocks_.count * (share + 1) / plan_.splits;
    for (int64_t index = begin; index < end; ++index) {
      const Block block(blocks_, phase_, p_.batch, index);
      const auto strip = make_strip<T, X>(static_cast<const X *>(p_.input), p_.x, phase_, block,
                                          {group * channels_, (group + 1) * channels_}, padded, copy);
      add_block(block, strip, part);
    }
    if (plan_.splits == 1)
      for (int64_t i = 0; i < part.n; ++i)
        finish_runs(group * out_ + o + i, g + i * plan_.pitch, row, columns);
  }

  // Adds what a block's pixels contribute, for so many output channels at a time as their share of dy, packed, fits.
  void add_block(const Block &block, const InputStrip<T> &strip, const Part &part) const {
    const int rows = plan_.shape.rows;
    const int64_t tiles = ceil_div(part.n, rows);
    const int64_t max_tiles = max_outer_bytes / int64_t(sizeof(T)) / block.pixels() / rows;
    for (int64_t tile = 0; tile < tiles; tile += max_tiles) {
      const int64_t some = min(max_tiles, tiles - tile), from = tile * rows;
      pack_outer_block(rows, static_cast<const X *>(p_.dy), p_.y, block, part.group * out_ + part.o + from,
                       min(some * rows, part.n - from), part.dy);
      for (int64_t t = 0; t < taps_; t += merged_)
        add_tap(t, block, strip, part, from, some);
    }
  }

  // Adds what a tap, or a run of merged ones, contributes to `tiles` tiles of G from row `from` on.
  void add_tap(int64_t t, const Block &block, const InputStrip<T> &strip, const Part &part, int64_t from,
               int64_t tiles) const {
    const int64_t i = t / (high().taps * broad().taps), j = t / broad().taps % high().taps, k = t % broad().taps;
    const auto inside = [&](const Phase::Dimension &along, int64_t shift, Range pixels) {
      return part.padded ? pixels : pixels_inside(along, shift, pixels);
    };
    const Range planes = inside(deep(), deep().shift[i], {block.depth, block.depth + 1});
    const Range lines = inside(high(), high().shift[j], block.lines);
    const Range columns = inside(broad(), broad().shift[k], block.columns);
    if (planes.size() <= 0 || columns.size() <= 0)
      return;
    // A run is a line of pixels.
    int64_t steps[max_pixels], offsets[max_pixels];
    OuterRuns runs{0, steps, offsets, columns.size(), broad().step * strip.pixel};
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t h = lines.begin; h < lines.end; ++h) {
        steps[runs.count] = block.number(image, h, columns.begin);
        offsets[runs.count++] = image * strip.image + (block.depth * deep().step + deep().shift[i]) * strip.plane +
                                (h * high().step + high().shift[j]) * strip.line +
                                (columns.begin * broad().step + broad().shift[k]) * strip.pixel;
      }
    const OuterOperands<T> operands{part.dy, tiles, block.pixels(), strip.origin, 0, plan_.run};
    T *g = part.g + from * plan_.pitch + t / merged_ * plan_.run_pitch;
    const int64_t lines_at_once = ceil_div(summed_at_once, runs.size), all = runs.count;
    for (int64_t line = 0; line < all; line += lines_at_once) {
      runs.count = min(lines_at_once, all - line);
      multiply_outer<T>(plan_.shape, runs, operands, g, plan_.pitch);
      runs.step += runs.count, runs.offset += runs.count;
    }
  }

  // Those of a block's pixels at which a tap is inside the input.
  static Range pixels_inside(const Phase::Dimension &along, int64_t shift, Range pixels) {
    const int64_t first = max(pixels.begin, ceil_div(max(0, -shift), along.step));
    const int64_t end = shift >= along.size ? first : min(pixels.end, (along.size - 1 - shift) / along.step + 1);
    return {first, end};
  }

  // The shares' sums of a channel, in order.
  __attribute__((noinline)) void add_shares(int64_t channel, double *columns) const {
    Scratch scratch(team_);
    T *g = scratch.take<T>(plan_.pitch), *row = scratch.take<T>(recipe_.row_size());
    const int64_t group = channel / out_, o = channel % out_;
    const T *shares = partials(group, o) + o % plan_.rows * plan_.pitch;
    for (int64_t l = 0; l < plan_.pitch; l += width<T>) {
      Vector<T> total = load(shares + l);
      for (int64_t share = 1; share < plan_.splits; ++share)
        total += load(shares + share * size_ + l);
      store(g + l, total);
    }
    finish_runs(channel, g, row, columns);
  }

  // Channel o of G, given with its runs apart and padded, into every gradient.
  void finish_runs(int64_t o, const T *g, T *row, double *columns) const {
    for (int64_t t = 0; t < taps_; ++t) {
      const T *from = g + t / merged_ * plan_.run_pitch + t % merged_ * channels_;
      if (recipe_.channels_inner() || taps_ == 1)
        for (int64_t c = 0; c < channels_; ++c)
          row[t * channels_ + c] = from[c];
      else
        for (int64_t c = 0; c < channels_; ++c)
          row[c * taps_ + t] = from[c];
    }
    finish_channel(o, row, columns);
  }

  void finish_channel(int64_t o, const T *row, double *columns) const {
    const Dots dots{wants_dots(p_.gradients) ? p_.dots + o : nullptr, p_.y.channels, columns};
    dots.clear(recipe_.dots());
    finish_row(recipe_, p_.gradients, o, 0, recipe_.row_size(), row, dots);
  }

  T *partials(int64_t group, int64_t o) const {
    return static_cast<T *>(p_.partials) + (group + o / plan_.rows * p_.groups) * plan_.splits * size_;
  }
  const Phase::Dimension &deep() const { return phase_.dimension[0]; }
  const Phase::Dimension &high() const { return phase_.dimension[1]; }
  const Phase::Dimension &broad() const { return phase_.dimension[2]; }

  const Conv &p_;
  const Phase &phase_;
  const Team &team_;
  const int64_t taps_, channels_, out_; // channels of a group
  const Mixed<S, X> recipe_;
  const Blocks blocks_;
  const WgradPlan plan_;
  const int64_t size_;   // of an item's sums
  const int64_t merged_; // taps in a run
};

template <class S, class X> void conv_wgrad(const Conv &p, const Team &team) {
  Phase phase;
  forward_phase(p, phase);
  ConvWgrad<S, X>(p, phase, team).run();
}

template <class T> bool conv_fits(const Conv &p) {
  const int64_t taps = tap_count(p), in = p.x.channels / p.groups, out = p.y.channels / p.groups;
  if (taps > max_taps || taps * max(in, out) * RLK_VECTOR_BYTES > max_panel_bytes ||
      max_outer_rows * taps * round_up(in, width<T>) * int64_t(sizeof(T)) > max_gradient_bytes)
    return false;
  int64_t extent = 1;
  for (int d = 0; d < 3; ++d)
    extent *= p.dilation[d] * (p.kernel[d] - 1) + 1;
  return extent * max(in, out) * int64_t(sizeof(T)) <= max_strip_bytes;
}

} // namespace
} // namespace rl_kernels::cpu
