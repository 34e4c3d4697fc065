// Convolutions as implicit products. Missing dimensions have size 1: everything is three-dimensional.
//
// Forward and dgrad are one correlation: output pixel p sums, over taps, the channels of input pixel p * step + shift
// times a slice of the mixed weight. (A strided dgrad is one such correlation for each phase of the stride, over the
// taps that meet it: no zero is multiplied.) Pixels are grouped by the taps that fall inside the input, so that padding
// is neither stored nor multiplied. The input is read where it is, or, where it is not in the type that is multiplied
// with its channels innermost, from a strip: a piece copied so.

constexpr int64_t max_taps = 1024; // of a kernel, and along one dimension
constexpr int64_t panel_bytes = 5 << 18, strip_bytes = 192 << 10, max_strip_bytes = 1 << 20, max_pixels = 1024;

// One correlation: which pixels, over the grid of taps that the lists of the three dimensions span.
struct Phase {
  struct Dimension {
    int64_t taps;
    int64_t shift[max_taps], index[max_taps]; // ascending shifts; tap of the kernel
    int64_t size;                             // of the input
    int64_t step;                             // of the input, a pixel
    int64_t pixels, first, out_step;          // of the output

    int64_t low() const { return taps ? shift[0] : 0; }
    int64_t high() const { return taps ? shift[taps - 1] : 0; }
    // The taps that fall inside the input at `pixel`: from..to.
    void inside(int64_t pixel, int64_t &from, int64_t &to) const {
      for (from = 0; from < taps && pixel * step + shift[from] < 0;)
        ++from;
      for (to = taps; to > from && pixel * step + shift[to - 1] >= size;)
        --to;
    }
    // The pixel after the last one from `pixel` on, below `end`, inside at the same taps.
    int64_t alike(int64_t pixel, int64_t end) const {
      int64_t from, to, other_from, other_to, next = pixel;
      inside(pixel, from, to);
      do {
        ++next;
        if (next < end)
          inside(next, other_from, other_to);
      } while (next < end && other_from == from && other_to == to);
      return next;
    }
    bool consecutive() const {
      for (int64_t t = 1; t < taps; ++t)
        if (shift[t] != shift[t - 1] + 1)
          return false;
      return true;
    }
  } dimension[3];

  int64_t taps() const { return dimension[0].taps * dimension[1].taps * dimension[2].taps; }
};

inline int64_t tap_count(const Conv &p) { return p.kernel[0] * p.kernel[1] * p.kernel[2]; }

inline void forward_phase(const Conv &p, Phase &phase) {
  for (int d = 0; d < 3; ++d) {
    Phase::Dimension &along = phase.dimension[d];
    along.taps = p.kernel[d];
    for (int64_t t = 0; t < along.taps; ++t) {
      along.shift[t] = t * p.dilation[d] - p.padding[d];
      along.index[t] = t;
    }
    along.size = p.x.size[d], along.step = p.stride[d];
    along.pixels = p.y.size[d], along.first = 0, along.out_step = 1;
  }
}

// The pixels of dx at `at` modulo the stride.
inline void dgrad_phase(const Conv &p, const int64_t (&at)[3], Phase &phase) {
  for (int d = 0; d < 3; ++d) {
    Phase::Dimension &along = phase.dimension[d];
    along.taps = 0;
    for (int64_t t = p.kernel[d] - 1; t >= 0; --t)
      if (const int64_t distance = at[d] + p.padding[d] - t * p.dilation[d]; distance % p.stride[d] == 0) {
        along.shift[along.taps] = distance / p.stride[d];
        along.index[along.taps++] = t;
      }
    along.size = p.y.size[d], along.step = 1;
    along.pixels = ceil_div(p.x.size[d] - at[d], p.stride[d]), along.first = at[d], along.out_step = p.stride[d];
  }
}

// How the pixels of a phase are cut into blocks: several images, whole lines, or parts of lines, as far as the input of
// a block is small.
struct Blocks {
  int64_t images, height, width, stacks, down, across, count;
  int64_t pixels() const { return images * height * width; }
};

template <class T> Blocks cut(const Phase &phase, int64_t batch, int64_t channels, bool copied, int threads) {
  const Phase::Dimension &depth = phase.dimension[0], &height = phase.dimension[1], &width = phase.dimension[2];
  const auto extent = [](const Phase::Dimension &along, int64_t pixels) {
    return least(along.size + 2, (pixels - 1) * along.step + along.high() - along.low() + 1);
  };
  const auto bytes = [&](int64_t lines, int64_t wide) {
    return extent(depth, 1) * extent(height, lines) * extent(width, wide) * channels * int64_t(sizeof(T));
  };
  Blocks blocks;
  blocks.width = least(width.pixels, max_pixels);
  while (blocks.width > 1 && bytes(1, blocks.width) > strip_bytes)
    blocks.width = ceil_div(blocks.width, 2);
  blocks.height = 1;
  while (blocks.height < height.pixels && bytes(blocks.height + 1, blocks.width) <= strip_bytes &&
         (blocks.height + 1) * blocks.width <= max_pixels)
    ++blocks.height;
  blocks.across = ceil_div(width.pixels, blocks.width);
  blocks.down = ceil_div(height.pixels, blocks.height);
  blocks.height = ceil_div(height.pixels, blocks.down);
  blocks.images = 1;
  if (blocks.down == 1 && blocks.across == 1 && depth.pixels == 1)
    while (blocks.images < batch / threads && (blocks.images + 1) * blocks.height * blocks.width <= max_pixels &&
           (!copied || (blocks.images + 1) * bytes(blocks.height, blocks.width) <= max_strip_bytes))
      ++blocks.images;
  blocks.stacks = ceil_div(batch, blocks.images);
  blocks.images = ceil_div(batch, blocks.stacks);
  blocks.count = blocks.stacks * depth.pixels * blocks.down * blocks.across;
  return blocks;
}

// One block: images, a depth, lines and pixels, each from..to.
struct Block {
  int64_t image, images, depth, top, bottom, left, right;
  Block(const Blocks &blocks, const Phase &phase, int64_t batch, int64_t index) {
    left = index % blocks.across * blocks.width, index /= blocks.across;
    top = index % blocks.down * blocks.height, index /= blocks.down;
    depth = index % phase.dimension[0].pixels;
    image = index / phase.dimension[0].pixels * blocks.images;
    images = least(blocks.images, batch - image);
    bottom = least(top + blocks.height, phase.dimension[1].pixels);
    right = least(left + blocks.width, phase.dimension[2].pixels);
  }
  int64_t lines() const { return bottom - top; }
  int64_t width() const { return right - left; }
  int64_t pixels() const { return images * lines() * width(); }
  // A pixel's number within the block.
  int64_t number(int64_t n, int64_t h, int64_t w) const { return (n * lines() + h - top) * width() + w - left; }
};

// The input of one block. `origin` is where input pixel (0, 0, 0) of the block's first image would be.
template <class T> struct Strip {
  const T *origin;
  int64_t image, plane, line, pixel;
};

// With `padded`, pixels outside the input are there as zeros.
template <class T, class X>
Strip<T> make_strip(const X *input, const Volume &in, const Phase &phase, const Block &block, int64_t channel,
                    int64_t channels, bool padded, T *copy) {
  const X *first = input + block.image * in.batch_stride + channel * in.channel_stride;
  if constexpr (sizeof(X) == sizeof(T))
    if (!padded && in.channel_stride == 1)
      return {first, in.batch_stride, in.stride[0], in.stride[1], in.stride[2]};
  const int64_t pixels[3][2] = {{block.depth, block.depth + 1}, {block.top, block.bottom}, {block.left, block.right}};
  int64_t begin[3], end[3], size[3]; // what the strip holds
  for (int d = 0; d < 3; ++d) {
    const Phase::Dimension &along = phase.dimension[d];
    begin[d] = pixels[d][0] * along.step + along.low();
    end[d] = (pixels[d][1] - 1) * along.step + along.high() + 1;
    if (!padded)
      begin[d] = most(begin[d], 0), end[d] = most(begin[d], least(end[d], in.size[d]));
    size[d] = end[d] - begin[d];
  }
  const int64_t line = size[2] * channels, plane = size[1] * line, image = size[0] * plane;
  const int64_t left = least(end[2], most(0, begin[2])), right = most(left, least(end[2], in.size[2]));
  const bool flat = in.stride[2] == 1 && in.stride[1] == in.size[2] && size[2] == in.size[2] && !padded;
  const auto clear = [](T *from, int64_t n) { __builtin_memset(from, 0, size_t(n) * sizeof(T)); };
  for (int64_t n = 0; n < block.images; ++n)
    for (int64_t z = begin[0]; z < end[0]; ++z) {
      const int64_t at = n * in.batch_stride + z * in.stride[0]; // of a plane that may lie outside
      T *to = copy + n * image + (z - begin[0]) * plane;
      if (flat && in.channel_stride != 1) { // whole lines follow one another on both sides
        transpose_block(first + at + begin[1] * in.stride[1], in.channel_stride, channels, size[1] * size[2], to,
                        channels);
        continue;
      }
      for (int64_t y = begin[1]; y < end[1]; ++y) {
        T *pixel = to + (y - begin[1]) * line;
        if (z < 0 || z >= in.size[0] || y < 0 || y >= in.size[1] || left == right) {
          clear(pixel, line);
          continue;
        }
        clear(pixel, (left - begin[2]) * channels);
        clear(pixel + (right - begin[2]) * channels, (end[2] - right) * channels);
        pixel += (left - begin[2]) * channels;
        const X *start = first + at + y * in.stride[1] + left * in.stride[2];
        if (in.channel_stride == 1 && in.stride[2] == channels)
          convert(start, (right - left) * channels, pixel);
        else if (in.channel_stride == 1)
          for (int64_t w = 0; w < right - left; ++w)
            convert(start + w * in.stride[2], channels, pixel + w * channels);
        else if (in.stride[2] == 1)
          transpose_block(start, in.channel_stride, channels, right - left, pixel, channels);
        else
          for (int64_t w = 0; w < right - left; ++w)
            for (int64_t c = 0; c < channels; ++c)
              pixel[w * channels + c] = load_one(start + w * in.stride[2] + c * in.channel_stride);
      }
    }
  return {copy - begin[0] * plane - begin[1] * line - begin[2] * channels, image, plane, line, channels};
}

// Writes sums (pixels of the block, pitch) to the output where it does not have its channels side by side in T.
template <class T, class X>
void write_block(const T *sums, int64_t pitch, X *out, const Volume &y, const Phase &phase, const Block &block,
                 int64_t columns) {
  const Phase::Dimension &height = phase.dimension[1], &width = phase.dimension[2];
  const int64_t pixel = width.out_step * y.stride[2];
  const bool flat = pixel == 1 && height.out_step == 1 && y.stride[1] == block.width();
  for (int64_t n = 0; n < block.images; ++n) {
    X *image = out + n * y.batch_stride + (width.first + block.left * width.out_step) * y.stride[2];
    const auto line = [&](int64_t h) { return image + (height.first + h * height.out_step) * y.stride[1]; };
    if (flat && y.channel_stride != 1) {
      transpose_block(sums + block.number(n, block.top, block.left) * pitch, pitch, block.lines() * block.width(),
                      columns, line(block.top), y.channel_stride);
      continue;
    }
    for (int64_t h = block.top; h < block.bottom; ++h) {
      X *to = line(h);
      const T *from = sums + block.number(n, h, block.left) * pitch;
      if (y.channel_stride == 1)
        for (int64_t w = 0; w < block.width(); ++w)
          convert_down(from + w * pitch, columns, to + w * pixel);
      else if (pixel == 1)
        transpose_block(from, pitch, block.width(), columns, to, y.channel_stride);
      else
        for (int64_t w = 0; w < block.width(); ++w)
          for (int64_t c = 0; c < columns; ++c)
            store_one(to + w * pixel + c * y.channel_stride, from[w * pitch + c]);
    }
  }
}

// How many vectors wide a panel of `depth` rows may be.
template <class T> int panel_vectors(int64_t depth, int64_t columns) {
  int vectors = vectors_for<T>(columns);
  while (vectors > 1 && depth * vectors * RLK_VECTOR_BYTES > panel_bytes)
    --vectors;
  return vectors;
}

// In how many shares to cut `count` blocks, at most `largest` and four a thread, so that the threads end together.
inline int64_t even_splits(int64_t count, int64_t largest, int64_t threads) {
  int64_t best = 1, shortest = count;
  for (int64_t splits = 2; splits <= least(least(count, largest), 4 * threads); ++splits)
    if (const int64_t length = ceil_div(count, splits) * ceil_div(splits, threads); length <= shortest)
      best = splits, shortest = length;
  return best;
}

// panel[(tap's place, output channel)][input channel] for n input channels from c on, and output channels
// o..o+channels.
template <class S, class X>
void pack_conv_transposed(const Mixed<S, X> &recipe, int64_t o, int64_t channels, int64_t c, int64_t n,
                          const int64_t *place, int64_t taps, int vectors, Accumulate<X> *panel, Accumulate<X> *row) {
  using T = Accumulate<X>;
  const int64_t wide = vectors * width<T>, in = recipe.row_size() / taps;
  for (int64_t r = 0; r < channels; ++r) {
    if (!recipe.channels_inner())
      recipe.row(o + r, c * taps, n * taps, row, 0);
    for (int64_t t = 0; t < taps; ++t) {
      if (place[t] < 0)
        continue;
      T *to = panel + (place[t] * channels + r) * wide;
      if (recipe.channels_inner())
        recipe.row(o + r, t * in + c, n, to, 0);
      else
        for (int64_t i = 0; i < n; ++i)
          to[i] = row[i * taps + t];
      for (int64_t i = n; i < wide; ++i)
        to[i] = 0;
    }
  }
}

// Calls body(top, bottom, left, right, taps from..to of the height, and of the width) for the rectangles of a block
// whose pixels are inside at the same taps.
template <class Body> void each_rectangle(const Phase &phase, const Block &block, const Body &body) {
  const Phase::Dimension &height = phase.dimension[1], &width = phase.dimension[2];
  for (int64_t top = block.top, bottom; top < block.bottom; top = bottom) {
    bottom = height.alike(top, block.bottom);
    int64_t above, below;
    height.inside(top, above, below);
    for (int64_t left = block.left, right; left < block.right; left = right) {
      right = width.alike(left, block.right);
      int64_t before, after;
      width.inside(left, before, after);
      body(top, bottom, left, right, above, below, before, after);
    }
  }
}

template <class S, class X, bool transposed>
void correlate(const Conv &p, const Phase &phase, const Volume &in, const Volume &out, const Team &team) {
  using T = Accumulate<X>;
  const Phase::Dimension &deep = phase.dimension[0], &high = phase.dimension[1], &broad = phase.dimension[2];
  const int64_t taps = tap_count(p), from_channels = in.channels / p.groups, to_channels = out.channels / p.groups;
  const Mixed<S, X> recipe(p.recipe, p.x.channels / p.groups, taps);
  const X *input = static_cast<const X *>(p.input);
  X *output = static_cast<X *>(p.out);
  const Blocks blocks =
      cut<T>(phase, p.batch, from_channels, sizeof(X) != sizeof(T) || in.channel_stride != 1, team.threads);
  const int64_t depth = phase.taps() * from_channels;
  const bool direct = sizeof(X) == sizeof(T) && out.channel_stride == 1;
  const bool has_bias = !transposed && p.recipe.bias[0] != nullptr;

  // An item is some panels of one group over a share of the blocks: all panels where that leaves every thread enough
  // pixels to repay the mix; else the panels are shared out too.
  const int vectors = panel_vectors<T>(depth, to_channels);
  const int64_t wide = vectors * width<T>, panels = ceil_div(to_channels, wide);
  const int64_t fit = most(1, panel_bytes / most(1, depth * wide * int64_t(sizeof(T))));
  const int64_t pixels = p.batch * deep.pixels * high.pixels * broad.pixels;
  const int64_t at_once = panels * p.groups > 1 && pixels < 1200 * team.threads
                              ? most(1, least(least(panels, fit), panels * p.groups / team.threads))
                              : least(panels, fit);
  const int64_t shares = ceil_div(panels, at_once) * p.groups;
  const int64_t splits = even_splits(blocks.count, most(ceil_div(team.threads, shares), pixels / 1200), team.threads);

  int64_t place[max_taps]; // of the kernel's taps among the phase's
  for (int64_t t = 0; t < taps; ++t)
    place[t] = -1;
  for (int64_t i = 0; i < deep.taps; ++i)
    for (int64_t j = 0; j < high.taps; ++j)
      for (int64_t k = 0; k < broad.taps; ++k)
        place[(deep.index[i] * p.kernel[1] + high.index[j]) * p.kernel[2] + broad.index[k]] =
            (i * high.taps + j) * broad.taps + k;

  share(team, shares * splits, [&](int64_t item) {
    Scratch scratch(team);
    T *packed = scratch.take<T>(at_once * depth * wide);
    T *copy = scratch.take<T>(max_strip_bytes / int64_t(sizeof(T)));
    T *sums = scratch.take<T>(direct ? 0 : blocks.pixels() * wide);
    int64_t *rows = scratch.take<int64_t>(transposed ? 0 : recipe.row_size()); // of a panel, for W's elements
    if (!transposed)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = 0; c < from_channels; ++c)
          rows[recipe.channels_inner() ? t * from_channels + c : c * taps + t] = place[t] * from_channels + c;
    const int64_t group = item / splits % p.groups, first = item / splits / p.groups * at_once;
    const int64_t some = least(at_once, panels - first);
    for (int64_t panel = 0; panel < some; ++panel) {
      const int64_t c = (first + panel) * wide, n = least(wide, to_channels - c);
      T *to = packed + panel * depth * wide;
      if constexpr (transposed)
        pack_conv_transposed(recipe, group * from_channels, from_channels, c, n, place, taps, vectors, to, copy);
      else
        pack_transposed(recipe, group * to_channels + c, n, 0, recipe.row_size(), vectors, to,
                        [=](int64_t element) { return rows[element]; });
    }
    const int64_t begin = blocks.count * (item % splits) / splits, end = blocks.count * (item % splits + 1) / splits;
    for (int64_t index = begin; index < end; ++index) {
      const Block block(blocks, phase, p.batch, index);
      const Strip<T> strip =
          make_strip<T, X>(input, in, phase, block, group * from_channels, from_channels, false, copy);
      const bool merged = strip.pixel == from_channels && broad.consecutive();
      X *corner = output + block.image * out.batch_stride + (deep.first + block.depth * deep.out_step) * out.stride[0] +
                  group * to_channels * out.channel_stride;
      int64_t front, back;
      deep.inside(block.depth, front, back);
      for (int64_t panel = 0; panel < some; ++panel) {
        const int64_t c = (first + panel) * wide, n = least(wide, to_channels - c);
        T bias[panel_width<T>];
        if (has_bias)
          for (int64_t i = 0; i < wide; ++i)
            bias[i] = i < n ? recipe.bias(group * to_channels + c + i) : 0;
        each_rectangle(phase, block,
                       [&](int64_t top, int64_t bottom, int64_t left, int64_t right, int64_t above, int64_t below,
                           int64_t before, int64_t after) {
                         int64_t offsets[max_taps], from[max_taps];
                         Runs runs{0, offsets, from, merged ? (after - before) * from_channels : from_channels};
                         for (int64_t i = front; i < back; ++i)
                           for (int64_t j = above; j < below; ++j)
                             for (int64_t k = before; k < after; k += merged ? after - before : 1) {
                               offsets[runs.count] = deep.shift[i] * strip.plane + high.shift[j] * strip.line +
                                                     broad.shift[k] * strip.pixel;
                               from[runs.count++] = ((i * high.taps + j) * broad.taps + k) * from_channels;
                             }
                         const T *a[max_pixels];
                         T *to[max_pixels];
                         int64_t count = 0;
                         for (int64_t image = 0; image < block.images; ++image)
                           for (int64_t h = top; h < bottom; ++h) {
                             const T *line = strip.origin + image * strip.image +
                                             block.depth * deep.step * strip.plane + h * high.step * strip.line;
                             X *out_line = corner + image * out.batch_stride + c * out.channel_stride +
                                           (high.first + h * high.out_step) * out.stride[1];
                             for (int64_t w = left; w < right; ++w, ++count) {
                               a[count] = line + w * broad.step * strip.pixel;
                               to[count] = sums + block.number(image, h, w) * wide;
                               if constexpr (sizeof(X) == sizeof(T))
                                 if (direct)
                                   to[count] = out_line + (broad.first + w * broad.out_step) * out.stride[2];
                             }
                           }
                         multiply<T>(vectors, runs, count, a, packed + panel * depth * wide,
                                     {to, direct ? n : wide, false, has_bias ? bias : nullptr});
                       });
        if (!direct)
          write_block(sums, wide, corner + c * out.channel_stride, out, phase, block, n);
      }
    }
  });
}

template <class S, class X> void conv_forward(const Conv &p, const Team &team) {
  Phase phase;
  forward_phase(p, phase);
  correlate<S, X, false>(p, phase, p.x, p.y, team);
}

template <class S, class X> void conv_dgrad(const Conv &p, const Team &team) {
  Phase phase;
  for (int64_t i = 0; i < least(p.stride[0], p.x.size[0]); ++i)
    for (int64_t j = 0; j < least(p.stride[1], p.x.size[1]); ++j)
      for (int64_t k = 0; k < least(p.stride[2], p.x.size[2]); ++k) {
        dgrad_phase(p, {i, j, k}, phase);
        correlate<S, X, true>(p, phase, p.y, p.x, team);
      }
}

// wgrad. G (output channels, runs of taps and input channels) is summed in scratch, over the pixels of every image.

// How G is cut: `rows` output channels an item; in `splits` shares of the pixels where the items are too few. Where
// there are few channels, the taps along the width are one run, over a padded strip.
struct WgradPlan {
  bool merged;
  int64_t run, run_pitch, pitch, rows, items, splits;
  OuterShape shape;
};

constexpr int64_t gradient_bytes = 5 << 18, outer_bytes = 1 << 19;
constexpr int64_t summed_at_once = 128; // pixels, before they join the sum over all

template <class T> WgradPlan plan_wgrad(const Conv &p, const Phase &phase, int threads) {
  const Phase::Dimension &broad = phase.dimension[2];
  const int64_t channels = p.x.channels / p.groups, out = p.y.channels / p.groups;
  WgradPlan plan;
  plan.merged = channels < 2 * width<T> && broad.taps > 1 && broad.consecutive();
  plan.run = plan.merged ? broad.taps * channels : channels;
  plan.run_pitch = round_up(plan.run, width<T>);
  plan.pitch = phase.taps() * channels / most(1, plan.run) * plan.run_pitch;
  plan.shape = outer_shape<T>(out, plan.run);
  const int64_t rows = plan.shape.rows;
  const int64_t fit = most(rows, gradient_bytes / most(1, plan.pitch * int64_t(sizeof(T))) / rows * rows);
  const int64_t shares = cut<T>(phase, p.batch, channels, true, threads).count;
  const int64_t count = blocks(out, least(fit, 256 / rows * rows), 8 * rows, ceil_div(threads, p.groups));
  plan.rows = round_up(ceil_div(out, count), rows);
  plan.items = ceil_div(out, plan.rows) * p.groups;
  plan.splits = 1;
  if (plan.items < threads) {
    // Too few items: the pixels are shared out, and the partial sums added in order.
    plan.rows = least(round_up(out, rows), fit);
    plan.items = ceil_div(out, plan.rows) * p.groups;
    const bool small = plan.rows * plan.pitch * int64_t(sizeof(T)) <= 1 << 16;
    plan.splits = most(1, least(shares, small ? 4 * threads : threads));
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
    for (int64_t h = block.top; h < block.bottom; ++h) {
      const X *line = corner + image * y.batch_stride + h * y.stride[1] + block.left * y.stride[2];
      const int64_t k = block.number(image, h, block.left);
      if (y.channel_stride == 1)
        for (int64_t w = 0; w < block.width(); ++w)
          pack_outer(rows, line + w * y.stride[2], n, k + w, steps, to);
      else
        for (int64_t i = 0; i < round_up(n, rows); ++i) {
          T *column = to + (i / rows * steps + k) * rows + i % rows;
          for (int64_t w = 0; w < block.width(); ++w)
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

template <class S, class X> void conv_wgrad(const Conv &p, const Team &team) {
  using T = Accumulate<X>;
  const int64_t taps = tap_count(p), channels = p.x.channels / p.groups, out = p.y.channels / p.groups;
  const Mixed<S, X> recipe(p.recipe, channels, taps);
  const Gradients &gradients = p.gradients;
  const X *x = static_cast<const X *>(p.input), *dy = static_cast<const X *>(p.dy);
  const bool needs_dots = gradients.coefficients != nullptr;
  bool needs_product = needs_dots, needs_sums = needs_dots && p.recipe.bias[0] != nullptr;
  for (int j = 0; j < p.recipe.sources; ++j) {
    needs_product |= gradients.weight[j] != nullptr;
    needs_sums |= gradients.bias[j] != nullptr;
  }
  Phase phase;
  forward_phase(p, phase);
  const Phase::Dimension &deep = phase.dimension[0], &high = phase.dimension[1], &broad = phase.dimension[2];
  const Blocks blocks = cut<T>(phase, p.batch, channels, true, team.threads);
  const WgradPlan plan = plan_wgrad<T>(p, phase, team.threads);
  const int64_t size = plan.rows * plan.pitch, merged = plan.merged ? broad.taps : 1;

  // Row o of G, given with its runs apart and padded, into every gradient.
  const auto finish = [&](int64_t o, const T *g, T *row) {
    for (int64_t t = 0; t < taps; ++t) {
      const T *from = g + t / merged * plan.run_pitch + t % merged * channels;
      if (recipe.channels_inner() || taps == 1)
        for (int64_t c = 0; c < channels; ++c)
          row[t * channels + c] = from[c];
      else
        for (int64_t c = 0; c < channels; ++c)
          row[c * taps + t] = from[c];
    }
    double *dots = needs_dots ? p.dots + o : nullptr;
    for (int j = 0; needs_dots && j < p.recipe.sources; ++j)
      dots[j * p.y.channels] = 0;
    finish_row(recipe, gradients, o, 0, recipe.row_size(), row, dots, p.y.channels);
  };

  if (needs_product && p.product != nullptr) {
    share(team, p.y.channels, [&](int64_t o) {
      const T *g = static_cast<const T *>(p.product) + o * recipe.row_size();
      double *dots = needs_dots ? p.dots + o : nullptr;
      for (int j = 0; needs_dots && j < p.recipe.sources; ++j)
        dots[j * p.y.channels] = 0;
      finish_row(recipe, gradients, o, 0, recipe.row_size(), g, dots, p.y.channels);
    });
  } else if (needs_product) {
    share(team, plan.items * plan.splits, [&](int64_t item) {
      Scratch scratch(team);
      T *g = scratch.take<T>(size);
      T *copy = scratch.take<T>(max_strip_bytes / int64_t(sizeof(T)) + width<T>);
      T *a = scratch.take<T>(outer_bytes / int64_t(sizeof(T)));
      T *row = scratch.take<T>(recipe.row_size());
      const int64_t part = item % plan.splits, group = item / plan.splits % p.groups;
      const int64_t o = item / plan.splits / p.groups * plan.rows, n = least(plan.rows, out - o);
      const int rows = plan.shape.rows;
      const int64_t tiles = ceil_div(n, rows);
      if (plan.splits > 1)
        g = static_cast<T *>(p.partials) + ((group + o / plan.rows * p.groups) * plan.splits + part) * size;
      for (int64_t l = 0; l < size; l += width<T>)
        store(g + l, Vector<T>{});
      const int64_t begin = blocks.count * part / plan.splits, end = blocks.count * (part + 1) / plan.splits;
      for (int64_t index = begin; index < end; ++index) {
        const Block block(blocks, phase, p.batch, index);
        // A vector that reaches past the last channel reads what follows: only a strip has room for that.
        const bool padded = plan.merged || plan.run != plan.run_pitch;
        const Strip<T> strip = make_strip<T, X>(x, p.x, phase, block, group * channels, channels, padded, copy);
        // Output channels as far as their share of dy, packed, fits.
        const int64_t most_tiles = outer_bytes / int64_t(sizeof(T)) / block.pixels() / rows;
        for (int64_t tile = 0; tile < tiles; tile += most_tiles) {
          const int64_t some = least(most_tiles, tiles - tile), from = tile * rows;
          pack_outer_block(rows, dy, p.y, block, group * out + o + from, least(some * rows, n - from), a);
          for (int64_t t = 0; t < taps; t += merged) {
            const int64_t i = t / (high.taps * broad.taps), j = t / broad.taps % high.taps, k = t % broad.taps;
            // The pixels at which the tap is inside the input.
            const auto clip = [&](const Phase::Dimension &along, int64_t shift, int64_t &first, int64_t &last) {
              if (padded)
                return;
              first = most(first, ceil_div(most(0, -shift), along.step));
              last = shift >= along.size ? first : least(last, (along.size - 1 - shift) / along.step + 1);
            };
            int64_t depth = block.depth, behind = depth + 1, top = block.top, bottom = block.bottom, left = block.left,
                    right = block.right;
            clip(deep, deep.shift[i], depth, behind);
            clip(high, high.shift[j], top, bottom);
            clip(broad, broad.shift[k], left, right);
            if (depth >= behind || left >= right)
              continue;
            int64_t steps[max_pixels], lines[max_pixels];
            OuterRuns runs{0, steps, lines, right - left, broad.step * strip.pixel};
            for (int64_t image = 0; image < block.images; ++image)
              for (int64_t h = top; h < bottom; ++h) {
                steps[runs.count] = block.number(image, h, left);
                lines[runs.count++] = image * strip.image + (block.depth * deep.step + deep.shift[i]) * strip.plane +
                                      (h * high.step + high.shift[j]) * strip.line +
                                      (left * broad.step + broad.shift[k]) * strip.pixel;
              }
            const int64_t lines_at_once = ceil_div(summed_at_once, runs.size), all = runs.count;
            for (int64_t line = 0; line < all; line += lines_at_once) {
              runs.count = least(lines_at_once, all - line);
              multiply_outer<T>(plan.shape, some, runs, block.pixels(), a, strip.origin, 0, plan.run,
                                g + from * plan.pitch + t / merged * plan.run_pitch, plan.pitch);
              runs.step += runs.count, runs.offset += runs.count;
            }
          }
        }
      }
      if (plan.splits == 1)
        for (int64_t i = 0; i < n; ++i)
          finish(group * out + o + i, g + i * plan.pitch, row);
    });
    if (plan.splits > 1)
      share(team, p.y.channels, [&](int64_t channel) {
        Scratch scratch(team);
        T *g = scratch.take<T>(plan.pitch), *row = scratch.take<T>(recipe.row_size());
        const int64_t group = channel / out, o = channel % out;
        const T *parts = static_cast<const T *>(p.partials) + (group + o / plan.rows * p.groups) * plan.splits * size +
                         o % plan.rows * plan.pitch;
        for (int64_t l = 0; l < plan.pitch; l += width<T>) {
          Vector<T> total = load(parts + l);
          for (int64_t part = 1; part < plan.splits; ++part)
            total += load(parts + part * size + l);
          store(g + l, total);
        }
        finish(channel, g, row);
      });
  }
  if (needs_sums) {
    double *sums = p.dots + p.recipe.sources * p.y.channels;
    share(team, ceil_div(p.y.channels, width<T>), [&](int64_t item) {
      const int64_t o = item * width<T>;
      sum_channels(dy, p.y, p.batch, o, least(width<T>, p.y.channels - o), sums + o);
    });
    finish_biases(recipe, p.recipe, gradients, p.y.channels, sums, needs_dots ? p.dots : nullptr);
  }
  if (needs_dots)
    finish_coefficients<S, X>(p.recipe, gradients, p.y.channels, p.dots);
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

template <class T> bool conv_fits(const Conv &p) {
  const int64_t taps = tap_count(p), in = p.x.channels / p.groups, out = p.y.channels / p.groups;
  if (taps > max_taps || taps * most(in, out) * RLK_VECTOR_BYTES > panel_bytes ||
      max_outer_rows * taps * round_up(in, width<T>) * int64_t(sizeof(T)) > gradient_bytes)
    return false;
  int64_t extent = 1;
  for (int d = 0; d < 3; ++d)
    extent *= p.dilation[d] * (p.kernel[d] - 1) + 1;
  return extent * most(in, out) * int64_t(sizeof(T)) <= max_strip_bytes;
}
