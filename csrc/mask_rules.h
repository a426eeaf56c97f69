// Masks from counter-based random numbers, for host and device.
//
// The rules are those in the docstring of vjepa_fast/masking/mask_rules.py, and the two must give the same bits. Only
// integers occur, so no compiler, device or order of execution can change a mask. Three parts: the generator, the
// geometry of a mask, and what is left of it after truncation.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vjepa_fast {

constexpr int64_t kMaxTokens = 1 << 18;  // the bitmap of a mask takes 32 KiB of shared memory
constexpr int64_t kMaxPlaces = 1 << 12;  // the block field of the random counter, four places a block
constexpr int64_t kMaxFrames = 1 << 8;   // its attempt field
constexpr int64_t kMaxBlocks = 1 << 10;  // its block field
constexpr int64_t kMaxMasks = 1 << 6;    // its mask field
constexpr int64_t kMaxGroups = 1 << 4;   // its group field
constexpr uint32_t kMaxAttempts = 32;
constexpr int kFractionBits = 24;

// ---------------------------------------------------------------------------------------------------- random numbers

// The numbers of vjepa_fast.common.rng.Stream.
enum Stream : uint32_t { kMaskSize = 1, kMaskPosition = 2, kMaskPatches = 11, kMaskFrames = 12 };

struct Words {
  uint32_t word[4];
};

struct Key {
  uint32_t low, high;
};

VF_HD uint32_t pack_tag(Stream stream, uint32_t group, uint32_t mask, uint32_t attempt = 0, uint32_t block = 0) {
  return uint32_t(stream) << 28 | group << 24 | mask << 18 | attempt << 10 | block;
}

// Philox-4x32 with 10 rounds (Salmon et al., SC 2011).
VF_HD Words philox4x32(Words counter, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t(0xD2511F53u) * counter.word[0];
    const uint64_t product_1 = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(product_1 >> 32) ^ counter.word[1] ^ key.low, uint32_t(product_1),
                uint32_t(product_0 >> 32) ^ counter.word[3] ^ key.high, uint32_t(product_0)}};
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return counter;
}

VF_HD Words random_words(Key key, uint64_t sample, uint32_t step, uint32_t tag) {
  return philox4x32({{uint32_t(sample), uint32_t(sample >> 32), step, tag}}, key);
}

// Uniform in [0, n).
VF_HD uint32_t below(uint32_t word, uint32_t n) { return uint32_t(uint64_t(word) * n >> 32); }

// ----------------------------------------------------------------------------------------------------------- geometry

// The numbers of vjepa_fast/config/mask_strategies.py.
enum Strategy : uint8_t { kMultiblock = 0, kTube = 1, kTemporal = 2, kPatches = 3, kMixture = 4, kFuture = 5 };
constexpr Strategy kLastStrategy = kFuture;

// Whether places are drawn one by one, so that kMaxPlaces holds.
constexpr bool draws_places(Strategy strategy) {
  return strategy == kTube || strategy == kPatches || strategy == kMixture;
}

// Whether they are in every frame anew, so that kMaxFrames holds.
constexpr bool draws_places_in_frames(Strategy strategy) { return strategy == kPatches || strategy == kMixture; }

// The numbers of COMPLEMENTS in vjepa_fast/masking/mask_rules.py.
enum Complement : uint8_t { kNoComplement = 0, kFullComplement = 1, kPredFullComplement = 2 };

struct Grid {
  uint32_t frames, height, width;

  VF_HD uint32_t places() const { return height * width; }
  VF_HD uint32_t tokens() const { return frames * height * width; }
};

// BlockSpec of mask_rules.py, where the fields are explained. 56 bytes: 64 of them fit the parameters of a kernel.
struct MaskRow {
  uint32_t num_blocks;
  uint32_t temporal_low, temporal_span;
  uint32_t spatial_low, spatial_span;
  uint32_t aspect_low, aspect_span;
  uint32_t predicted;
  uint64_t temporal_below;
  uint32_t max_context_frames;
  uint32_t max_keep;  // the number of tokens where the configuration has none
  Strategy strategy;
  Complement complement;
  bool inv_block;
};

// From BlockSpec.to_ints, which somebody has checked.
VF_HD MaskRow row_of_ints(const int64_t* ints, const Grid& grid) {
  return {uint32_t(ints[1]), uint32_t(ints[2]), uint32_t(ints[3]), uint32_t(ints[4]), uint32_t(ints[5]),
          uint32_t(ints[6]), uint32_t(ints[7]), uint32_t(ints[8]), uint64_t(ints[9]), uint32_t(ints[10]),
          ints[11] ? uint32_t(ints[11]) : grid.tokens(), Strategy(ints[0]), Complement(ints[12]), ints[13] != 0};
}

static_assert(sizeof(MaskRow) == 56, "see above");

// All that the masks of a batch have in common.
struct Problem {
  MaskRow rows[kMaxMasks];
  Grid grid;
  Key key;
  uint32_t group;
  uint32_t num_masks;
};

// What one mask of one sample is drawn from.
struct Draw {
  Key key;
  uint64_t sample;
  uint32_t step;
  uint32_t group;
  uint32_t mask;

  VF_HD Words words(Stream stream, uint32_t attempt = 0, uint32_t block = 0) const {
    return random_words(key, sample, step, pack_tag(stream, group, mask, attempt, block));
  }
};

VF_HD uint32_t isqrt(uint64_t value) {
  uint64_t root = 0;
  for (uint64_t bit = uint64_t(1) << 26; bit; bit >>= 1) {  // values are below 2^52
    const uint64_t larger = root | bit;
    if (larger * larger <= value) root = larger;
  }
  return uint32_t(root);
}

VF_HD uint32_t clamp_to(uint64_t value, uint32_t low, uint32_t high) {
  return value < low ? low : value > high ? high : uint32_t(value);
}

// Frames, height and width of every block of one mask in one step.
VF_HD Grid block_size(const MaskRow& row, const Grid& grid, Draw draw) {
  draw.sample = 0;
  const Words r = draw.words(kMaskSize);
  const uint64_t temporal = row.temporal_low + below(r.word[0], row.temporal_span);
  const uint64_t spatial = row.spatial_low + below(r.word[1], row.spatial_span);
  const uint64_t ratio = uint64_t(row.aspect_low) + below(r.word[2], row.aspect_span);
  const uint64_t scaled = grid.places() * spatial >> kFractionBits;
  const uint64_t area = scaled ? scaled : 1;
  return {clamp_to(grid.frames * temporal >> kFractionBits, 1, grid.frames),
          clamp_to((isqrt(area * ratio >> (kFractionBits - 2)) + 1) >> 1, 1, grid.height),
          clamp_to((isqrt((area << (kFractionBits + 2)) / ratio) + 1) >> 1, 1, grid.width)};
}

struct Origin {
  uint32_t start, top, left;
};

VF_HD Origin block_origin(const Draw& draw, const Grid& grid, const Grid& size, uint32_t attempt, uint32_t block) {
  const Words r = draw.words(kMaskPosition, attempt, block);
  return {below(r.word[2], grid.frames - size.frames + 1), below(r.word[0], grid.height - size.height + 1),
          below(r.word[1], grid.width - size.width + 1)};
}

// How many of n places or frames are predicted.
VF_HD uint32_t target_count(const MaskRow& row, uint32_t n) {
  const uint64_t rounded = (n * uint64_t(row.predicted) + (1u << (kFractionBits - 1))) >> kFractionBits;
  return clamp_to(rounded, 1, n) < n ? clamp_to(rounded, 1, n) : n - 1;
}

// Which frames or places a sample predicts under the strategies that go by ratio.
struct ByRatio {
  bool in_frames;               // a run of frames; else a subset of the places
  uint32_t begin_frame, count;  // of the run; the count is that of the places for a subset
  uint32_t num_subsets;         // 1: the same places in every frame
};

VF_HD ByRatio by_ratio(const MaskRow& row, const Grid& grid, const Draw& draw) {
  const uint32_t num_frames = target_count(row, grid.frames), num_places = target_count(row, grid.places());
  if (row.strategy == kFuture) return {true, grid.frames - num_frames, num_frames, 0};
  if (row.strategy == kTube) return {false, 0, num_places, 1};
  if (row.strategy == kPatches) return {false, 0, num_places, grid.frames};
  const Words r = draw.words(kMaskFrames);
  if (row.strategy == kMixture && r.word[1] >= row.temporal_below) return {false, 0, num_places, grid.frames};
  return {true, below(r.word[0], grid.frames - num_frames + 1), num_frames, 0};
}

// Order of a place in the draw of a subset: unique, the smallest are taken. 44 bits.
VF_HD uint64_t place_key(uint32_t word, uint32_t place) { return uint64_t(word) << 12 | place; }

// ------------------------------------------------------------------------------------- truncation, complement and swap

struct Lengths {
  uint32_t context, target;
};

// Lengths of a sequence after every rule, from the smallest untruncated ones of its truncation group.
VF_HD Lengths final_lengths(const MaskRow& row, uint32_t num_tokens, uint32_t least_context, uint32_t least_target) {
  Lengths kept = {least_context < row.max_keep ? least_context : row.max_keep, least_target};
  if (row.complement == kFullComplement) kept.target = num_tokens - kept.context;
  if (row.complement == kPredFullComplement) kept.context = num_tokens - kept.target;
  if (row.inv_block && kept.target) kept = {kept.target, kept.context};
  return kept;
}

// How final lengths come about: how many ids of context and target were kept, and whether the two were swapped.
struct Kept {
  uint32_t context, target;
  bool swapped;
};

VF_HD Kept kept_before_swap(const MaskRow& row, const Lengths& final) {
  // A swap leaves targets: what was the context, which is never empty.
  const bool swapped = row.inv_block && final.target;
  return swapped ? Kept{final.target, final.context, true} : Kept{final.context, final.target, false};
}

}  // namespace vjepa_fast
