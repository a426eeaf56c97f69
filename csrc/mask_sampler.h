// What one thread block does to draw, truncate and pack one mask, in phases with a barrier after each.
//
// The kernels of mask_sampler.cu are shells around this; tests/csrc runs it on the CPU. The CPU operator has its own
// loops over the same rules (mask_rules.h).
//
// A Block has `each(f)`: f(thread, num_threads) for every thread, then a barrier. Threads of one phase may run in any
// order, so a phase reads nothing that the same phase writes, except through the atomics; values that live from one
// phase to the next are in Shared, or are computed alike by all threads. A value read between two phases must not be
// written by the phase that follows. num_threads is 1 or a multiple of 32.
#pragma once

#include "mask_rules.h"

namespace vjepa_fast {

// The bits of word number `index` that belong to ids below `end`.
VF_HD uint32_t bits_below(uint32_t end, uint32_t index) {
  const uint32_t begin = index * 32;
  return end <= begin ? 0 : end - begin >= 32 ? ~0u : (1u << (end - begin)) - 1;
}

VF_HD uint32_t popcount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return uint32_t(__builtin_popcount(bits));
#endif
}

constexpr uint32_t kMaxThreads = 256;
constexpr uint32_t kDigitBits = 6;
constexpr uint32_t kNumDigits = 1 << kDigitBits;
constexpr uint32_t kPlaceKeyBits = 48;  // 44, rounded up to whole digits

struct Shared {
  Origin origins[kMaxBlocks];
  uint32_t counts[kMaxThreads];  // context tokens that each thread counted
  uint32_t histogram[kNumDigits];
  uint32_t sums[4];
  // State of the search for a subset, see select_places.
  uint64_t prefix;
  uint64_t bound;
  uint32_t remaining;
};

// With a bitmap, what every GPU gives a block without being asked.
static_assert(sizeof(Shared) + kMaxTokens / 8 <= 48 << 10, "too much shared memory");

VF_HD void atomic_or(uint32_t* word, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  atomicOr(word, bits);
#else
  *word |= bits;
#endif
}

VF_HD void atomic_add(uint32_t* word, uint32_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(word, value);
#else
  *word += value;
#endif
}

VF_HD void set_run(uint32_t* bitmap, uint32_t begin, uint32_t end) {
  for (uint32_t index = begin / 32; index * 32 < end; ++index) {
    atomic_or(&bitmap[index], bits_below(end, index) & ~bits_below(begin, index));
  }
}

VF_HD uint32_t group_of_threads(uint32_t num_threads) { return num_threads < 32 ? num_threads : 32; }

// Words of the bitmap that a warp (or a lone thread) works on: consecutive ones, so that ids come out in order.
struct WordRange {
  uint32_t begin, end;
};

VF_HD WordRange words_of(uint32_t thread, uint32_t num_threads, uint32_t num_words) {
  const uint32_t group = group_of_threads(num_threads), num_groups = num_threads / group;
  const uint32_t chunk = (num_words + num_groups - 1) / num_groups, begin = thread / group * chunk;
  return {begin < num_words ? begin : num_words, begin + chunk < num_words ? begin + chunk : num_words};
}

// Context bits of a word whose target bits were painted.
VF_HD uint32_t context_bits(uint32_t painted, const Problem& problem, const MaskRow& row, uint32_t index) {
  return ~painted & bits_below(row.max_context_frames * problem.grid.places(), index);
}

template <class Block>
VF_HD void clear(Block& block, uint32_t* bitmap, uint32_t num_words) {
  block.each([&](uint32_t thread, uint32_t num_threads) {
    for (uint32_t index = thread; index < num_words; index += num_threads) bitmap[index] = 0;
  });
}

// Paint the blocks of one attempt.
template <class Block>
VF_HD void paint_blocks(Block& block, Shared& shared, uint32_t* bitmap, const MaskRow& row, const Grid& grid,
                        const Grid& size, const Draw& draw, uint32_t attempt) {
  block.each([&](uint32_t thread, uint32_t num_threads) {
    for (uint32_t i = thread; i < row.num_blocks; i += num_threads) {
      shared.origins[i] = block_origin(draw, grid, size, attempt, i);
    }
  });
  block.each([&](uint32_t thread, uint32_t num_threads) {
    // An item is one row of one frame of one block.
    const uint32_t rows_per_block = size.frames * size.height, num_items = row.num_blocks * rows_per_block;
    for (uint32_t item = thread; item < num_items; item += num_threads) {
      const Origin origin = shared.origins[item / rows_per_block];
      const uint32_t within = item % rows_per_block;
      const uint32_t frame = origin.start + within / size.height, y = origin.top + within % size.height;
      const uint32_t begin = (frame * grid.height + y) * grid.width + origin.left;
      set_run(bitmap, begin, begin + size.width);
    }
  });
}

// Find `shared.bound` such that exactly `count` places have a smaller key in subset number `subset`: by digits from the
// top, ending as soon as the whole rest is taken.
template <class Block>
VF_HD void select_places(Block& block, Shared& shared, uint32_t num_places, uint32_t count, uint32_t subset,
                         const Draw& draw) {
  block.each([&](uint32_t thread, uint32_t) {
    if (thread == 0) {
      shared.prefix = 0;
      shared.remaining = count;
      shared.bound = 0;
    }
  });
  if (count == 0) return;
  for (uint32_t shift = kPlaceKeyBits - kDigitBits;; shift -= kDigitBits) {
    block.each([&](uint32_t thread, uint32_t num_threads) {
      for (uint32_t digit = thread; digit < kNumDigits; digit += num_threads) shared.histogram[digit] = 0;
    });
    block.each([&](uint32_t thread, uint32_t num_threads) {
      for (uint32_t quarter = thread; quarter * 4 < num_places; quarter += num_threads) {
        const Words r = draw.words(kMaskPatches, subset, quarter);
        for (uint32_t j = 0; j < 4 && quarter * 4 + j < num_places; ++j) {
          const uint64_t digits = place_key(r.word[j], quarter * 4 + j) >> shift;
          if (digits >> kDigitBits == shared.prefix) atomic_add(&shared.histogram[digits % kNumDigits], 1);
        }
      }
    });
    // The digit that holds the last place to be taken: one thread finds that it is its own. The others leave the state
    // alone, and it gets there by way of `sums`, because they read it in this phase.
    block.each([&](uint32_t thread, uint32_t num_threads) {
      for (uint32_t digit = thread; digit < kNumDigits; digit += num_threads) {
        uint32_t before = 0;
        for (uint32_t other = 0; other < kNumDigits; ++other) before += other < digit ? shared.histogram[other] : 0;
        if (before < shared.remaining && shared.remaining <= before + shared.histogram[digit]) {
          shared.sums[0] = digit;
          shared.sums[1] = before;
        }
      }
    });
    block.each([&](uint32_t thread, uint32_t) {
      if (thread != 0) return;
      shared.prefix = shared.prefix << kDigitBits | shared.sums[0];
      shared.remaining -= shared.sums[1];
      if (shared.remaining == shared.histogram[shared.sums[0]]) shared.bound = (shared.prefix + 1) << shift;
    });
    if (shared.bound) return;  // at shift 0 the rest is one place, so the loop ends there at the latest
  }
}

// Paint one subset of the places, in frames begin_frame .. end_frame - 1.
template <class Block>
VF_HD void paint_subset(Block& block, Shared& shared, uint32_t* bitmap, uint32_t num_places, uint32_t count,
                        uint32_t subset, uint32_t begin_frame, uint32_t end_frame, const Draw& draw) {
  select_places(block, shared, num_places, count, subset, draw);
  block.each([&](uint32_t thread, uint32_t num_threads) {
    for (uint32_t quarter = thread; quarter * 4 < num_places; quarter += num_threads) {
      const Words r = draw.words(kMaskPatches, subset, quarter);
      for (uint32_t j = 0; j < 4 && quarter * 4 + j < num_places; ++j) {
        const uint32_t place = quarter * 4 + j;
        if (place_key(r.word[j], place) >= shared.bound) continue;
        for (uint32_t frame = begin_frame; frame < end_frame; ++frame) {
          const uint32_t id = frame * num_places + place;
          atomic_or(&bitmap[id / 32], 1u << (id % 32));
        }
      }
    }
  });
}

// Count the context: shared.counts by thread, returned in all.
template <class Block>
VF_HD uint32_t count_context(Block& block, Shared& shared, const uint32_t* bitmap, const Problem& problem,
                             const MaskRow& row, uint32_t num_words) {
  block.each([&](uint32_t thread, uint32_t num_threads) {
    const WordRange range = words_of(thread, num_threads, num_words);
    const uint32_t group = group_of_threads(num_threads);
    uint32_t count = 0;
    for (uint32_t index = range.begin + thread % group; index < range.end; index += group) {
      count += popcount(context_bits(bitmap[index], problem, row, index));
    }
    shared.counts[thread] = count;
    if (thread == 0) shared.sums[0] = 0;
  });
  block.each([&](uint32_t thread, uint32_t) {
    if (shared.counts[thread]) atomic_add(&shared.sums[0], shared.counts[thread]);
  });
  return shared.sums[0];
}

// Draw one mask of one sample into `bitmap` (a set bit is no context), and count its context.
template <class Block>
VF_HD uint32_t draw_mask(Block& block, Shared& shared, uint32_t* bitmap, const Problem& problem, const MaskRow& row,
                         const Draw& draw) {
  const Grid grid = problem.grid;
  const uint32_t num_words = (grid.tokens() + 31) / 32;
  uint32_t count = 0;
  if (row.strategy == kMultiblock) {
    const Grid size = block_size(row, grid, draw);
    for (uint32_t attempt = 0; attempt < kMaxAttempts && count == 0; ++attempt) {
      clear(block, bitmap, num_words);
      paint_blocks(block, shared, bitmap, row, grid, size, draw, attempt);
      count = count_context(block, shared, bitmap, problem, row, num_words);
    }
  } else {
    clear(block, bitmap, num_words);
    const ByRatio chosen = by_ratio(row, grid, draw);
    if (chosen.in_frames) {
      const uint32_t begin = chosen.begin_frame * grid.places(), end = begin + chosen.count * grid.places();
      block.each([&](uint32_t thread, uint32_t num_threads) {
        for (uint32_t index = thread; index < num_words; index += num_threads) {
          bitmap[index] = bits_below(end, index) & ~bits_below(begin, index);
        }
      });
    } else {
      const uint32_t frames_each = chosen.num_subsets == 1 ? grid.frames : 1;
      for (uint32_t subset = 0; subset < chosen.num_subsets; ++subset) {
        paint_subset(block, shared, bitmap, grid.places(), chosen.count, subset, subset * frames_each,
                     (subset + 1) * frames_each, draw);
      }
    }
    count = count_context(block, shared, bitmap, problem, row, num_words);
  }
  if (count) return count;
  // No context: token 0.
  block.each([&](uint32_t thread, uint32_t num_threads) {
    for (uint32_t index = thread; index < num_words; index += num_threads) bitmap[index] = index ? ~0u : ~1u;
  });
  return count_context(block, shared, bitmap, problem, row, num_words);
}

struct SampleOutputs {
  int32_t* context_ids;
  int32_t* target_ids;
  int32_t* cu_seqlens;  // [3, num_sequences + 1]
  int32_t* totals;      // [2]
  uint32_t capacity_context, capacity_target;
};

// Element `rank` of a sequence with `length` elements from `offset` on, if it fits.
VF_HD void put(int32_t* ids, uint32_t capacity, uint32_t offset, uint32_t length, uint32_t rank, uint32_t id) {
  if (rank < length && offset + rank < capacity) ids[offset + rank] = int32_t(id);
}

// Write the ids of one sequence, its row of cu_seqlens and its share of the zeros behind the total. Lengths that do not
// belong to these masks write nothing outside the sequence's own range.
template <class Block>
VF_HD void sample_block(Block& block, Shared& shared, uint32_t* bitmap, const Problem& problem, uint32_t step,
                        const int64_t* sample_ids, uint32_t batch_size, const int32_t* lengths, uint32_t sequence,
                        const SampleOutputs& out) {
  const uint32_t num_sequences = problem.num_masks * batch_size, num_tokens = problem.grid.tokens();
  const auto length_of = [&](uint32_t kind, uint32_t s) {
    const int32_t given = lengths[kind * num_sequences + s];
    return given < 0 ? 0 : uint32_t(given) < num_tokens ? uint32_t(given) : num_tokens;
  };
  block.each([&](uint32_t thread, uint32_t num_threads) {
    for (uint32_t i = thread; i < 4; i += num_threads) shared.sums[i] = 0;
  });
  // sums: context and target in front of this sequence, and in all.
  block.each([&](uint32_t thread, uint32_t num_threads) {
    uint32_t sums[4] = {0, 0, 0, 0};
    for (uint32_t s = thread; s < num_sequences; s += num_threads) {
      for (uint32_t kind = 0; kind < 2; ++kind) {
        const uint32_t length = length_of(kind, s);
        sums[kind] += s < sequence ? length : 0;
        sums[2 + kind] += length;
      }
    }
    for (uint32_t i = 0; i < 4; ++i) {
      if (sums[i]) atomic_add(&shared.sums[i], sums[i]);
    }
  });
  const uint32_t context_offset = shared.sums[0], target_offset = shared.sums[1];
  const uint32_t context_total = shared.sums[2], target_total = shared.sums[3];
  block.each([&](uint32_t thread, uint32_t num_threads) {
    const auto put_offsets = [&](uint32_t s, uint32_t context, uint32_t target) {
      context = context < out.capacity_context ? context : out.capacity_context;
      target = target < out.capacity_target ? target : out.capacity_target;
      out.cu_seqlens[s] = int32_t(context);
      out.cu_seqlens[num_sequences + 1 + s] = int32_t(target);
      out.cu_seqlens[2 * (num_sequences + 1) + s] = int32_t(context + target);
    };
    if (thread == 0) {
      if (sequence < num_sequences) put_offsets(sequence, context_offset, target_offset);
      if (sequence == 0) {
        put_offsets(num_sequences, context_total, target_total);
        out.totals[0] = int32_t(context_total);
        out.totals[1] = int32_t(target_total);
      }
    }
    // 64 bits: the stride could carry a 32-bit index over the end.
    const uint64_t first = uint64_t(sequence) * num_threads + thread;
    const uint64_t stride = uint64_t(num_sequences ? num_sequences : 1) * num_threads;
    for (uint64_t i = context_total + first; i < out.capacity_context; i += stride) out.context_ids[i] = 0;
    for (uint64_t i = target_total + first; i < out.capacity_target; i += stride) out.target_ids[i] = 0;
  });
  if (sequence >= num_sequences) return;

  const uint32_t mask = sequence / batch_size;
  const MaskRow& row = problem.rows[mask];
  const Draw draw = {problem.key, uint64_t(sample_ids[sequence % batch_size]), step, problem.group, mask};
  const uint32_t num_context = draw_mask(block, shared, bitmap, problem, row, draw);
  const Lengths final = {length_of(0, sequence), length_of(1, sequence)};
  const Kept kept = kept_before_swap(row, final);
  const auto put_context = [&](uint32_t rank, uint32_t id) {
    put(out.context_ids, out.capacity_context, context_offset, final.context, rank, id);
  };
  const auto put_target = [&](uint32_t rank, uint32_t id) {
    put(out.target_ids, out.capacity_target, target_offset, final.target, rank, id);
  };
  block.each([&](uint32_t thread, uint32_t num_threads) {
    const uint32_t num_words = (num_tokens + 31) / 32, group = group_of_threads(num_threads), lane = thread % group;
    const WordRange range = words_of(thread, num_threads, num_words);
    uint32_t context_before = 0;  // context tokens in front of the word
    for (uint32_t other = 0; other < thread - lane; ++other) context_before += shared.counts[other];
    for (uint32_t index = range.begin; index < range.end; ++index) {
      const uint32_t context = context_bits(bitmap[index], problem, row, index);
      for (uint32_t bit = lane; bit < 32 && index * 32 + bit < num_tokens; bit += group) {
        const uint32_t id = index * 32 + bit;
        const uint32_t context_rank = context_before + popcount(context & ((1u << bit) - 1));
        const uint32_t target_rank = id - context_rank;
        const bool is_context = context >> bit & 1;
        const bool keeps = is_context ? context_rank < kept.context : target_rank < kept.target;
        // Which list the id goes to before the swap, and its place there.
        bool to_context = is_context;
        uint32_t rank = is_context ? context_rank : target_rank;
        if (row.complement == kFullComplement && !(is_context && keeps)) {
          to_context = false;
          rank = id - (context_rank < kept.context ? context_rank : kept.context);
        } else if (row.complement == kPredFullComplement && !(!is_context && keeps)) {
          to_context = true;
          rank = id - (target_rank < kept.target ? target_rank : kept.target);
        } else if (!keeps) {
          continue;
        }
        if (to_context != kept.swapped) {
          put_context(rank, id);
        } else {
          put_target(rank, id);
        }
      }
      context_before += popcount(context);
    }
    // Lengths above what the mask has, which only a caller can have made up, are filled with zeros.
    const uint32_t num_target = num_tokens - num_context;
    Lengths found = {kept.context < num_context ? kept.context : num_context,
                     kept.target < num_target ? kept.target : num_target};
    if (row.complement == kFullComplement) found.target = num_tokens - found.context;
    if (row.complement == kPredFullComplement) found.context = num_tokens - found.target;
    if (kept.swapped) found = {found.target, found.context};
    for (uint32_t rank = found.context + thread; rank < final.context; rank += num_threads) put_context(rank, 0);
    for (uint32_t rank = found.target + thread; rank < final.target; rank += num_threads) put_target(rank, 0);
  });
}

// Lengths of one sequence, from the untruncated context lengths [num_masks, num_members] of the members. A sample that
// is not among the members gets empty masks.
VF_HD Lengths lengths_of_sequence(const Problem& problem, const int64_t* members, uint32_t num_members,
                                  const int32_t* context_counts, int64_t group_size, uint32_t mask, int64_t sample) {
  const uint32_t num_tokens = problem.grid.tokens();
  uint32_t least = num_tokens, most = 0;
  bool found = false;
  for (uint32_t i = 0; i < num_members; ++i) {
    const bool same = group_size == 0  ? members[i] == sample
                      : group_size < 0 ? true
                                       : members[i] / group_size == sample / group_size;
    if (!same) continue;
    found = found || members[i] == sample;
    const uint32_t count = uint32_t(context_counts[uint64_t(mask) * num_members + i]);
    least = count < least ? count : least;
    most = count > most ? count : most;
  }
  if (!found) return {0, 0};
  return final_lengths(problem.rows[mask], num_tokens, least, num_tokens - most);
}

}  // namespace vjepa_fast
