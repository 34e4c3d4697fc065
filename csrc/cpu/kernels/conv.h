// Convolutions as implicit products: forward and dgrad, both correlations (conv_phase.h).
//
// Pixels are grouped by the taps that fall inside the input, so that padding is neither stored nor multiplied. The
// input is read where it is, or, where it is not in the type that is multiplied with its channels innermost, from a
// strip: a piece copied so.
#pragma once

#include "conv_phase.h"
#include "conv_strip.h"
#include "mix.h"
#include "pack.h"
#include "parallel.h"
#include "problem.h"
#include "tile.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

constexpr int64_t max_panel_bytes = 5 << 18;
constexpr int64_t pixels_to_repay_a_mix = 1200;

// How many vectors wide a panel of `depth` rows may be.
template <class T> int panel_vectors(int64_t depth, int64_t columns) {
  int vectors = vectors_for<T>(columns);
  while (vectors > 1 && depth * vectors * RLK_VECTOR_BYTES > max_panel_bytes)
    --vectors;
  return vectors;
}

// One correlation of forward or, transposed, of dgrad, from the channels of `in` to those of `out`.
template <class S, class X, bool transposed> class Correlation {
public:
  using T = Accumulate<X>;

  Correlation(const Conv &p, const Phase &phase, int threads)
      : p_(p), phase_(phase), in_(transposed ? p.y : p.x), out_(transposed ? p.x : p.y),
        recipe_(p.recipe, p.x.channels / p.groups, tap_count(p)), from_channels_(in_.channels / p.groups),
        to_channels_(out_.channels / p.groups), depth_(phase.taps() * from_channels_),
        blocks_(cut<T>(phase, p.batch, from_channels_, sizeof(X) != sizeof(T) || in_.channel_stride != 1, threads)),
        direct_(sizeof(X) == sizeof(T) && out_.channel_stride == 1) {
    plan(threads);
    find_places();
  }

  void run(const Team &team) const {
    share(team, shares_ * splits_, [&](int64_t item) { compute(item, team); });
  }

private:
  // An item is some panels of one group over a share of the blocks: all panels where that leaves every thread enough
  // pixels to repay the mix; else the panels are shared out too.
  void plan(int threads) {
    vectors_ = panel_vectors<T>(depth_, to_channels_);
    wide_ = vectors_ * width<T>, panels_ = ceil_div(to_channels_, wide_);
    const int64_t fit = max(1, max_panel_bytes / max(1, depth_ * wide_ * int64_t(sizeof(T))));
    const int64_t pixels = p_.batch * deep().pixels * high().pixels * broad().pixels;
    at_once_ = panels_ * p_.groups > 1 && pixels < pixels_to_repay_a_mix * threads
                   ? max(1, min(min(panels_, fit), panels_ * p_.groups / threads))
                   : min(panels_, fit);
    shares_ = ceil_div(panels_, at_once_) * p_.groups;
    splits_ = even_splits(blocks_.count, max(ceil_div(threads, shares_), pixels / pixels_to_repay_a_mix), threads);
  }

  void find_places() {
    for (int64_t t = 0; t < tap_count(p_); ++t)
      place_[t] = -1;
    for (int64_t i = 0; i < deep().taps; ++i)
      for (int64_t j = 0; j < high().taps; ++j)
        for (int64_t k = 0; k < broad().taps; ++k)
          place_[(deep().index[i] * p_.kernel[1] + high().index[j]) * p_.kernel[2] + broad().index[k]] =
              place_of(i, j, k);
  }

  // Some panels of a group, and output channel `c` of the group that a panel begins with.
  struct Panels {
    int64_t group, first, count;
    T *packed;
  };
  int64_t channel_of(const Panels &panels, int64_t panel) const { return (panels.first + panel) * wide_; }
  int64_t columns_of(int64_t c) const { return min(wide_, to_channels_ - c); }

  void compute(int64_t item, const Team &team) const {
    Scratch scratch(team);
    T *packed = scratch.take<T>(at_once_ * depth_ * wide_);
    T *copy = scratch.take<T>(max_strip_bytes / int64_t(sizeof(T)));
    T *sums = scratch.take<T>(direct_ ? 0 : blocks_.pixels() * wide_);
    const int64_t first = item / splits_ / p_.groups * at_once_;
    const Panels panels{item / splits_ % p_.groups, first, min(at_once_, panels_ - first), packed};
    if constexpr (transposed)
      pack_from_rows(panels, copy);
    else
      pack_from_columns(panels, scratch.take<int64_t>(recipe_.row_size()));
    const int64_t part = item % splits_;
    const int64_t begin = blocks_.count * part / splits_, end = blocks_.count * (part + 1) / splits_;
    const int64_t channel = panels.group * from_channels_;
    for (int64_t index = begin; index < end; ++index) {
      const Block block(blocks_, phase_, p_.batch, index);
      const auto strip = make_strip<T, X>(static_cast<const X *>(p_.input), in_, phase_, block,
                                          {channel, channel + from_channels_}, false, copy);
      multiply_block(block, strip, panels, sums);
    }
  }

  // panel[(tap's place, input channel)][output channel]. `rows` says which row of a panel an element of W belongs to.
  void pack_from_columns(const Panels &panels, int64_t *rows) const {
    const int64_t taps = tap_count(p_);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < from_channels_; ++c)
        rows[recipe_.channels_inner() ? t * from_channels_ + c : c * taps + t] = place_[t] * from_channels_ + c;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t c = channel_of(panels, panel);
      pack_transposed(recipe_, panels.group * to_channels_ + c, columns_of(c), 0, recipe_.row_size(), vectors_,
                      panels.packed + panel * depth_ * wide_, [=](int64_t element) { return rows[element]; });
    }
  }

  // panel[(tap's place, output channel)][input channel]
  void pack_from_rows(const Panels &panels, T *row) const {
    const int64_t taps = tap_count(p_), in = recipe_.row_size() / taps;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t c = channel_of(panels, panel), n = columns_of(c);
      for (int64_t r = 0; r < from_channels_; ++r) {
        const int64_t o = panels.group * from_channels_ + r;
        if (!recipe_.channels_inner())
          recipe_.row(o, c * taps, n * taps, row, 0);
        for (int64_t t = 0; t < taps; ++t) {
          if (place_[t] < 0)
            continue;
          T *to = panels.packed + panel * depth_ * wide_ + (place_[t] * from_channels_ + r) * wide_;
          if (recipe_.channels_inner())
            recipe_.row(o, t * in + c, n, to, 0);
          else
            for (int64_t i = 0; i < n; ++i)
              to[i] = row[i * taps + t];
          for (int64_t i = n; i < wide_; ++i)
            to[i] = 0;
        }
      }
    }
  }

  void multiply_block(const Block &block, const InputStrip<T> &strip, const Panels &panels, T *sums) const {
    const bool has_bias = !transposed && p_.recipe.bias[0] != nullptr;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t c = channel_of(panels, panel), n = columns_of(c), channel = panels.group * to_channels_ + c;
      X *corner = static_cast<X *>(p_.out) + block.image * out_.batch_stride +
                  (deep().first + block.depth * deep().out_step) * out_.stride[0] + channel * out_.channel_stride;
      T bias[panel_width<T>];
      if (has_bias)
        for (int64_t i = 0; i < wide_; ++i)
          bias[i] = i < n ? recipe_.bias(channel + i) : 0;
      each_rectangle(phase_, block, [&](const Rectangle &rectangle) {
        int64_t offsets[max_taps], rows[max_taps];
        const Runs runs = runs_of(rectangle, deep().inside(block.depth), strip, offsets, rows);
        const T *a[max_pixels];
        T *to[max_pixels];
        const int64_t count = point_at(rectangle, block, strip, a);
        point_out(rectangle, block, corner, sums, to);
        multiply<T>(vectors_, runs, count, a, panels.packed + panel * depth_ * wide_,
                    {to, direct_ ? n : wide_, false, has_bias ? bias : nullptr});
      });
      if (!direct_)
        write_block(sums, wide_, corner, out_, phase_, block, n);
    }
  }

  // What a rectangle's pixels multiply: a run for each tap or, where the taps of a line follow one another in the
  // strip, for each line of them.
  Runs runs_of(const Rectangle &rectangle, Range plane_taps, const InputStrip<T> &strip, int64_t *offsets,
               int64_t *rows) const {
    const auto &[before, after] = rectangle.column_taps;
    const bool merged = strip.pixel == from_channels_ && broad().consecutive();
    Runs runs{0, offsets, rows, merged ? (after - before) * from_channels_ : from_channels_};
    for (int64_t i = plane_taps.begin; i < plane_taps.end; ++i)
      for (int64_t j = rectangle.line_taps.begin; j < rectangle.line_taps.end; ++j)
        for (int64_t k = before; k < after; k += merged ? after - before : 1) {
          offsets[runs.count] =
              deep().shift[i] * strip.plane + high().shift[j] * strip.line + broad().shift[k] * strip.pixel;
          rows[runs.count++] = place_of(i, j, k) * from_channels_;
        }
    return runs;
  }

  // Where a rectangle's pixels are in the strip; returns how many there are.
  int64_t point_at(const Rectangle &rectangle, const Block &block, const InputStrip<T> &strip, const T **a) const {
    int64_t count = 0;
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t h = rectangle.lines.begin; h < rectangle.lines.end; ++h) {
        const T *line =
            strip.origin + image * strip.image + block.depth * deep().step * strip.plane + h * high().step * strip.line;
        for (int64_t w = rectangle.columns.begin; w < rectangle.columns.end; ++w)
          a[count++] = line + w * broad().step * strip.pixel;
      }
    return count;
  }

  // Where their sums go: to the output from `corner` on or, where that takes another form, to `sums`.
  void point_out(const Rectangle &rectangle, const Block &block, X *corner, T *sums, T **to) const {
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t h = rectangle.lines.begin; h < rectangle.lines.end; ++h) {
        X *line = corner + image * out_.batch_stride + (high().first + h * high().out_step) * out_.stride[1];
        for (int64_t w = rectangle.columns.begin; w < rectangle.columns.end; ++w, ++to) {
          *to = sums + block.number(image, h, w) * wide_;
          if constexpr (sizeof(X) == sizeof(T))
            if (direct_)
              *to = line + (broad().first + w * broad().out_step) * out_.stride[2];
        }
      }
  }

  const Phase::Dimension &deep() const { return phase_.dimension[0]; }
  const Phase::Dimension &high() const { return phase_.dimension[1]; }
  const Phase::Dimension &broad() const { return phase_.dimension[2]; }
  int64_t place_of(int64_t i, int64_t j, int64_t k) const { return (i * high().taps + j) * broad().taps + k; }

  const Conv &p_;
  const Phase &phase_;
  const Volume &in_, &out_;
  const Mixed<S, X> recipe_;
  const int64_t from_channels_, to_channels_; // of a group
  const int64_t depth_;                       // of a panel
  const Blocks blocks_;
  const bool direct_; // sums are written where they belong, from registers
  int vectors_;       // of a panel
  int64_t wide_, panels_, at_once_, shares_, splits_;
  int64_t place_[max_taps]; // of the kernel's taps among the phase's; -1 where a tap is not in it
};

template <class S, class X> void conv_forward(const Conv &p, const Team &team) {
  Phase phase;
  forward_phase(p, phase);
  Correlation<S, X, false>(p, phase, team.threads).run(team);
}

template <class S, class X> void conv_dgrad(const Conv &p, const Team &team) {
  Phase phase;
  for (int64_t i = 0; i < min(p.stride[0], p.x.size[0]); ++i)
    for (int64_t j = 0; j < min(p.stride[1], p.x.size[1]); ++j)
      for (int64_t k = 0; k < min(p.stride[2], p.x.size[2]); ++k) {
        dgrad_phase(p, {i, j, k}, phase);
        Correlation<S, X, true>(p, phase, team.threads).run(team);
      }
}

template <class S, class X> void conv_mix(const Conv &p, void *bias, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.x.channels / p.groups, tap_count(p));
  share(team, p.y.channels, [&](int64_t o) {
    recipe.row(o, 0, recipe.row_size(), static_cast<T *>(p.out) + o * recipe.row_size(), 0);
    if (p.recipe.bias[0] != nullptr)
      static_cast<T *>(bias)[o] = recipe.bias(o);
  });
}

} // namespace
} // namespace rl_kernels::cpu
