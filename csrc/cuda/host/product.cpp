#include "product.h"

#include "heuristics.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace rl_kernels::cuda::host {
namespace {

constexpr int64_t MAX_REDUCTION_BLOCKS = 1 << 16; // its threads go on where there is more
constexpr int SKINNY_TOKENS[] = {8, 16};          // numbers of tokens that there are kernels for
constexpr int RESIDENT_ROWS[] = {16, 32, 64};     // numbers of features that there are kernels for
constexpr int RESIDENT_TAPS = 9;                  // at most
constexpr int RESIDENT_THREADS_AT_ONCE = 512;     // that a multiprocessor's registers suffice for
constexpr int TILES_A_BLOCK = 2;                  // at least, for a filter that is mixed once to pay

bool is_pair(const Call &call) { return call.sources == 2 && call.coefficients.dims == 1; }

// "forward_pair", say: the direction, and which recipes a kernel is for.
void write_kind(Name &name, const Multiplication &product) {
  name << (product.transposed ? "dgrad" : "forward") << (is_pair(product.call) ? "_pair_" : "_general_");
}

struct Cut {
  int64_t steps = 0;
  int splits = 1, stages = 0;
};

// For a kernel that writes to `target`.
Product params_of(const Multiplication &product, uint64_t target, const Cut &cut) {
  const Call &call = product.call;
  const int64_t channels = product.channels(), features = product.features(), taps = product.meeting.all_taps();
  Product p = {};
  p.recipe = recipe_of(call, product.weights, product.groups, taps > 1 && !product.transposed ? channels : ANY,
                       product.transposed);
  if (call.biased && !product.transposed)
    for (int j = 0; j < call.sources; ++j) {
      p.biases[j] = call.biases[j].address;
      p.bias_strides[j] = call.biases[j].strides[0];
    }
  p.activation = product.activation.address;
  p.out = target;
  write_strides(p.activation_strides, product.activation);
  write_strides(p.out_strides, product.out);
  p.correlation = product.meeting.with_channels(channels);
  p.pixels = int32_t(product.pixels());
  p.features = int32_t(features);
  p.channels = int32_t(channels);
  p.steps = int32_t(cut.steps);
  p.splits = cut.splits;
  p.stages = cut.stages;
  p.groups = int32_t(product.groups);
  p.vector_activation = is_vector(product.activation, product.groups > 1 || taps > 1 ? channels : ANY);
  p.vector_out = cut.splits == 1 ? is_vector(product.out, features) : features % 4 == 0;
  return p;
}

// Where each split writes its share of the sum; out, where there is one.
uint64_t shares_of(const Multiplication &product, int splits, Plan &plan) {
  if (splits == 1)
    return product.out.address;
  return plan.workspace(int64_t(sizeof(float)) * splits * product.pixels() * product.out.sizes[1]);
}

// Writes out from the splits' shares, which `params` were for.
void reduce(const Multiplication &product, Product params, Plan &plan) {
  const uint64_t shares = std::exchange(params.out, product.out.address);
  Name name;
  name << (product.linear() ? "linear" : "conv") << "_reduce_" << element_name(product.call.element);
  const int64_t blocks = std::min(cdiv(numel(product.out), name.facts().threads), MAX_REDUCTION_BLOCKS);
  plan.add(name.number(), {blocks}, 0, ProductReduction{params, shares});
}

// Shared memory that the products of convolutions keep beside the stages, at most.
int kept_bytes() {
  static const int most = [] {
    int found = 0;
    for (const Size &size : PRODUCTS) {
      Name name;
      name << "conv_forward_pair_" << size.rows << "x" << size.columns << "_bf16";
      found = std::max(found, name.facts().kept_bytes);
    }
    return found;
  }();
  return most;
}

// A tile a block, of any size.
void multiply_tiles(const Multiplication &product, Plan &plan) {
  const Call &call = product.call;
  const int32_t bytes = product.activation.bytes;
  const Work work = {product.features(),    product.pixels(),     product.meeting.all_taps() * product.channels(),
                     product.groups,        call.sources * bytes, bytes,
                     slowness(call.element)};
  const Choice choice = chosen(call, false, work, call.device.shared_bytes - (product.linear() ? 0 : kept_bytes()));
  const Configuration &c = choice.configuration;
  Name name;
  name << (product.linear() ? "linear_" : "conv_");
  write_kind(name, product);
  name << c.rows << "x" << c.columns << "_" << element_name(call.element);
  const LaunchFacts &facts = name.facts();
  const Product params =
      params_of(product, shares_of(product, choice.splits, plan), {choice.steps, choice.splits, c.stages});
  const int64_t tiles = cdiv(work.rows, c.rows) * cdiv(work.columns, c.columns);
  const int64_t stage_bytes = facts.stage_bytes + int64_t(call.sources) * facts.source_bytes;
  plan.add(name.number(), {tiles, product.groups, choice.splits},
           std::max<int64_t>(c.stages * stage_bytes, facts.epilogue_bytes), params);
  if (choice.splits > 1)
    reduce(product, params, plan);
}

// Few tokens, as fast as the sources can be read.
void multiply_skinny(const Multiplication &product, Plan &plan) {
  const Call &call = product.call;
  Name name;
  name << "skinny_";
  write_kind(name, product);
  name << (product.pixels() <= SKINNY_TOKENS[0] ? SKINNY_TOKENS[0] : SKINNY_TOKENS[1]) << "_"
       << element_name(call.element);
  const LaunchFacts &facts = name.facts();
  const int64_t blocks = cdiv(product.features(), facts.rows);
  const int64_t turns = std::max<int64_t>(1, cdiv(product.channels(), facts.depth_bytes / product.activation.bytes));
  int64_t splits = call.held.skinny_splits;
  if (splits == 0) { // as many as make one full wave of blocks, if there is so much to sum
    // On a multiprocessor, by the kernels' registers.
    const int at_once = is_pair(call) && product.pixels() <= SKINNY_TOKENS[0] ? 2 : 1;
    const int64_t wave = int64_t(at_once) * call.device.multiprocessors;
    const int64_t share_bytes = int64_t(sizeof(float)) * numel(product.out);
    splits =
        std::max<int64_t>(1, std::min({wave / blocks, turns, WORKSPACE_BYTES / std::max<int64_t>(1, share_bytes)}));
  }
  const int64_t steps = cdiv(turns, splits);
  if (call.held.skinny_splits == 0)
    splits = cdiv(turns, steps);
  const Product params =
      params_of(product, shares_of(product, int(splits), plan), {.steps = steps, .splits = int(splits)});
  plan.add(name.number(), {blocks, 1, splits}, 0, params);
  if (splits > 1)
    reduce(product, params, plan);
}

// Convolutions of few channels, whose mixed filter stays on chip.
class Resident {
public:
  explicit Resident(const Multiplication &product) : product_(product) {
    const auto *rows = std::find_if(std::begin(RESIDENT_ROWS), std::end(RESIDENT_ROWS),
                                    [&](int most) { return product.features() <= most; });
    name_ << "resident_";
    write_kind(name_, product);
    name_ << *rows << "_" << element_name(product.call.element);
    // Chunks are of the channels of one tap each, of which the last are filled up.
    const LaunchFacts &facts = name_.facts();
    const int64_t chunks =
        product.meeting.all_taps() * cdiv(product.channels() * product.activation.bytes, COPIED_BYTES);
    steps_ = std::max<int64_t>(1, cdiv(chunks, facts.depth_bytes / COPIED_BYTES));
  }

  static bool could(const Multiplication &product) {
    const int64_t most = RESIDENT_ROWS[std::size(RESIDENT_ROWS) - 1];
    return product.features() <= most && product.channels() <= most && product.meeting.all_taps() <= RESIDENT_TAPS;
  }

  // With as many stages as leave the device full; false where other kernels are better.
  bool plan() {
    const Held &held = product_.call.held;
    if (held.resident_blocks > 0) {
      blocks_ = held.resident_blocks;
      stages_ = held.resident_stages;
      return true;
    }
    const Device &device = product_.call.device;
    const int64_t tiles = product_.pixels() / name_.facts().columns;
    for (const int stages : STAGES) {
      const int64_t at_once =
          std::min<int64_t>(device.shared_bytes / shared(stages), RESIDENT_THREADS_AT_ONCE / name_.facts().threads);
      blocks_ = std::min(cdiv(device.multiprocessors * at_once, product_.groups), tiles / TILES_A_BLOCK);
      stages_ = stages;
      if (blocks_ * product_.groups >= device.multiprocessors)
        return true;
    }
    return false;
  }

  void add(Plan &plan) const {
    const int64_t blocks = std::min(blocks_, cdiv(product_.pixels(), name_.facts().columns));
    plan.add(name_.number(), {blocks, product_.groups}, shared(stages_),
             params_of(product_, product_.out.address, {.stages = stages_}));
  }

private:
  // For the filter and where its chunks lie, the stages of the activation, and a tile of results.
  int64_t shared(int stages) const {
    const LaunchFacts &facts = name_.facts();
    return steps_ * facts.step_bytes + int64_t(stages) * facts.stage_bytes + facts.epilogue_bytes;
  }

  const Multiplication &product_;
  Name name_;
  int64_t steps_ = 1, blocks_ = 0;
  int stages_ = 0;
};

} // namespace

void multiply_rows(const Multiplication &product, Plan &plan) {
  const int most = SKINNY_TOKENS[std::size(SKINNY_TOKENS) - 1];
  if (product.pixels() <= most && !product.call.held.products_only)
    multiply_skinny(product, plan);
  else
    multiply_tiles(product, plan);
}

void multiply_pixels(const Multiplication &product, Plan &plan) {
  if (Resident::could(product) && !product.call.held.products_only)
    if (Resident resident(product); resident.plan())
      return resident.add(plan);
  multiply_tiles(product, plan);
}

} // namespace rl_kernels::cuda::host
