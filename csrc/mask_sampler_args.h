// Arguments of the mask operators: every one is checked here, for both devices, so that whatever comes from Python ends
// in a message or in masks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "mask_rules.h"

namespace vjepa_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNumSpecInts = 14;  // BlockSpec.to_ints
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

// One-dimensional unless `shape` is given.
inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& like,
                         const std::vector<int64_t>& shape = {-1}) {
  check(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
        "; expected ", torch::headeronly::toString(dtype));
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        " is on another device than step; put them on the same one");
  bool fits = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || tensor.size(int64_t(i)) == shape[i];
  if (!fits) {
    std::ostringstream message;
    message << name << " has shape [";
    for (int64_t i = 0; i < tensor.dim(); ++i) message << (i ? ", " : "") << tensor.size(i);
    message << "]; expected [";
    for (size_t i = 0; i < shape.size(); ++i) {
      message << (i ? ", " : "") << (shape[i] < 0 ? "any" : std::to_string(shape[i]));
    }
    throw std::runtime_error(message.str() + "]");
  }
  check(tensor.is_contiguous(), name, " is not contiguous; call .contiguous()");
}

inline MaskRow make_row(const int64_t* ints, const Grid& grid) {
  check_range("strategy of specs", ints[0], 0, kLastStrategy);
  check_range("num_blocks of specs", ints[1], 1, kMaxBlocks);
  const char* ranges[3] = {"temporal scale of specs", "spatial scale of specs", "aspect ratio of specs"};
  for (int i = 0; i < 3; ++i) {
    const int64_t largest = int64_t(i < 2 ? 1 : 255) << kFractionBits;
    const int64_t low = ints[2 + 2 * i], span = ints[3 + 2 * i];
    check_range(ranges[i], low, 1, largest);
    check_range(ranges[i], span, 0, largest - low);
  }
  check_range("ratio of specs", ints[8], 1, 1 << kFractionBits);
  check_range("temporal probability of specs", ints[9], 0, int64_t(1) << 32);
  check_range("max_context_frames of specs", ints[10], 1, grid.frames);
  check_range("max_keep of specs (0: none)", ints[11], 0, grid.tokens());
  check_range("complement of specs", ints[12], kNoComplement, kPredFullComplement);
  check_range("inv_block of specs", ints[13], 0, 1);
  const auto strategy = Strategy(ints[0]);
  if (draws_places(strategy)) {
    check(grid.places() <= kMaxPlaces, "grid has ", grid.places(), " places a frame; strategy ", ints[0],
          " draws from at most ", kMaxPlaces);
  }
  if (draws_places_in_frames(strategy)) {
    check(grid.frames <= kMaxFrames, "grid has ", grid.frames, " frames; strategy ", ints[0], " draws for at most ",
          kMaxFrames);
  }
  return row_of_ints(ints, grid);
}

// Everything but the capacities, and for `mask_lengths` the members.
inline Problem make_problem(const Tensor& step, const Tensor& sample_ids, const std::vector<int64_t>& specs,
                            const std::vector<int64_t>& grid, int64_t seed, int64_t group) {
  check(step.scalar_type() == ScalarType::Long && step.numel() == 1,
        "step is no int64 tensor of one element; pass torch.tensor([step])");
  check_tensor("sample_ids", sample_ids, ScalarType::Long, step);
  check(grid.size() == 3, "grid has ", grid.size(), " entries; expected frames, height and width in tokens");
  for (const int64_t side : grid) check_range("a side of grid", side, 1, kMaxTokens);
  // Sides of at most 2^18 tokens: the product fits 64 bits.
  check_range("number of tokens of grid", grid[0] * grid[1] * grid[2], 1, kMaxTokens);
  check_range("group", group, 0, kMaxGroups - 1);
  check(!specs.empty() && specs.size() % kNumSpecInts == 0 && int64_t(specs.size()) <= kMaxMasks * kNumSpecInts,
        "specs has ", specs.size(), " integers; expected ", kNumSpecInts, " a mask, for 1 to ", kMaxMasks, " masks");
  Problem problem;
  problem.grid = {uint32_t(grid[0]), uint32_t(grid[1]), uint32_t(grid[2])};
  problem.key = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
  problem.group = uint32_t(group);
  problem.num_masks = uint32_t(specs.size() / kNumSpecInts);
  for (uint32_t mask = 0; mask < problem.num_masks; ++mask) {
    problem.rows[mask] = make_row(&specs[mask * kNumSpecInts], problem.grid);
  }
  check(sample_ids.numel() <= kLargest / (int64_t(problem.num_masks) * problem.grid.tokens()), sample_ids.numel(),
        " samples of ", problem.num_masks, " masks and ", problem.grid.tokens(),
        " tokens; packed ids are 32-bit, so the product must be at most ", kLargest, ". Use a smaller batch");
  return problem;
}

inline void check_members(const Problem& problem, const Tensor& members, const Tensor& step, int64_t group_size) {
  check_tensor("members", members, ScalarType::Long, step);
  check(members.numel() <= kLargest / problem.num_masks, "members has ", members.numel(), " entries; expected at most ",
        kLargest / problem.num_masks);
  check(group_size >= -1, "group_size is ", group_size, "; expected 0 (no truncation), -1 (all members are one group) ",
        "or the clips of a truncation group");
}

inline void check_sample_arguments(const Problem& problem, const Tensor& step, const Tensor& sample_ids,
                                   const Tensor& lengths, int64_t capacity_context, int64_t capacity_target) {
  check_tensor("lengths", lengths, ScalarType::Int, step, {2, sample_ids.numel() * problem.num_masks});
  check_range("capacity_context", capacity_context, 0, kLargest);
  check_range("capacity_target", capacity_target, 0, kLargest);
}

inline void check_philox_counter(const Tensor& counter) {
  check(counter.scalar_type() == ScalarType::Long && counter.dim() == 2 && counter.size(1) == 4 &&
            counter.is_contiguous() && counter.size(0) <= kLargest,
        "counter is no contiguous int64 tensor of shape [n, 4]");
}

}  // namespace vjepa_fast
