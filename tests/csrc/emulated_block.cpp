// The thread block of csrc/mask_sampler.h on the CPU: all threads of a phase one after another, in a chosen order, then
// the next phase. Built and called by tests/masking/test_mask_sample.py.

#include <cstddef>
#include <vector>

#include "../../csrc/mask_sampler.h"

using namespace vjepa_fast;

namespace {

// Threads 0, stride, 2 * stride, ... modulo their number, which is a power of two; stride is odd.
struct EmulatedBlock {
  uint32_t num_threads, stride;

  template <class Function>
  void each(const Function& f) {
    for (uint32_t i = 0; i < num_threads; ++i) f(i * stride % num_threads, num_threads);
  }
};

Problem make_problem(const int64_t* specs, uint32_t num_masks, const int64_t* grid, uint64_t seed, uint32_t group) {
  Problem problem;
  problem.grid = {uint32_t(grid[0]), uint32_t(grid[1]), uint32_t(grid[2])};
  problem.key = {uint32_t(seed), uint32_t(seed >> 32)};
  problem.group = group;
  problem.num_masks = num_masks;
  for (uint32_t mask = 0; mask < num_masks; ++mask) problem.rows[mask] = row_of_ints(specs + 14 * mask, problem.grid);
  return problem;
}

// What a device may hold before a launch.
Shared poisoned() {
  Shared shared;
  auto* bytes = reinterpret_cast<unsigned char*>(&shared);
  for (std::size_t i = 0; i < sizeof(shared); ++i) bytes[i] = 0xA5;
  return shared;
}

std::vector<uint32_t> bitmap_of(const Problem& problem) {
  return std::vector<uint32_t>((problem.grid.tokens() + 31) / 32, 0xA5A5A5A5u);
}

}  // namespace

extern "C" void emulated_lengths(int64_t step, const int64_t* sample_ids, int64_t num_samples, const int64_t* members,
                                 int64_t num_members, const int64_t* specs, int64_t num_masks, const int64_t* grid,
                                 int64_t seed, int64_t group, int64_t group_size, int64_t num_threads, int64_t stride,
                                 int32_t* lengths) {
  const Problem problem = make_problem(specs, uint32_t(num_masks), grid, uint64_t(seed), uint32_t(group));
  std::vector<int32_t> counts;
  for (uint32_t mask = 0; mask < problem.num_masks; ++mask) {
    for (int64_t i = 0; i < num_members; ++i) {
      Shared shared = poisoned();
      auto bitmap = bitmap_of(problem);
      EmulatedBlock block{uint32_t(num_threads), uint32_t(stride)};
      const Draw draw = {problem.key, uint64_t(members[i]), uint32_t(step), problem.group, mask};
      counts.push_back(int32_t(draw_mask(block, shared, bitmap.data(), problem, problem.rows[mask], draw)));
    }
  }
  for (int64_t s = 0; s < num_masks * num_samples; ++s) {
    const Lengths found = lengths_of_sequence(problem, members, uint32_t(num_members), counts.data(), group_size,
                                              uint32_t(s / num_samples), sample_ids[s % num_samples]);
    lengths[s] = int32_t(found.context);
    lengths[num_masks * num_samples + s] = int32_t(found.target);
  }
}

extern "C" void emulated_sample(int64_t step, const int64_t* sample_ids, int64_t num_samples, const int32_t* lengths,
                                const int64_t* specs, int64_t num_masks, const int64_t* grid, int64_t seed,
                                int64_t group, int64_t capacity_context, int64_t capacity_target, int64_t num_threads,
                                int64_t stride, int32_t* context_ids, int32_t* target_ids, int32_t* cu_seqlens,
                                int32_t* totals) {
  const Problem problem = make_problem(specs, uint32_t(num_masks), grid, uint64_t(seed), uint32_t(group));
  const SampleOutputs out = {context_ids, target_ids, cu_seqlens, totals, uint32_t(capacity_context),
                             uint32_t(capacity_target)};
  const uint32_t num_blocks = num_samples ? uint32_t(num_masks * num_samples) : 1;
  for (uint32_t i = num_blocks; i-- > 0;) {
    Shared shared = poisoned();
    auto bitmap = bitmap_of(problem);
    EmulatedBlock block{uint32_t(num_threads), uint32_t(stride)};
    sample_block(block, shared, bitmap.data(), problem, uint32_t(step), sample_ids, uint32_t(num_samples), lengths, i,
                 out);
  }
}
