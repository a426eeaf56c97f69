// Schema of the mask operators and their CPU kernels, behind PyTorch's stable ABI (vjepa_fast/masking/mask_sample.py).
//
// A mask is a bitmap in words of 64 tokens. Blocks are painted into one frame, which is then copied to all frames that
// the same blocks cover; ids are written eight at a time from a table.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>

#include "mask_sampler_args.h"

namespace vjepa_fast {
namespace {

using Word = uint64_t;
constexpr uint32_t kWordBits = 64;
// Tokens that one thread draws in about the time that it takes to wake another one.
constexpr int64_t kTokensPerTask = 1 << 17;

uint32_t num_words_of(uint32_t num_bits) { return (num_bits + kWordBits - 1) / kWordBits; }

// The bits of word number `index` that belong to ids below `end`.
Word word_below(uint32_t end, uint32_t index) {
  const uint32_t begin = index * kWordBits;
  return end <= begin ? 0 : end - begin >= kWordBits ? ~Word(0) : (Word(1) << (end - begin)) - 1;
}

uint32_t count_bits(Word word) { return uint32_t(__builtin_popcountll(word)); }

void set_bits(Word* words, uint32_t begin, uint32_t end) {
  for (uint32_t index = begin / kWordBits; index * kWordBits < end; ++index) {
    words[index] |= word_below(end, index) & ~word_below(begin, index);
  }
}

// Set bits offset .. offset + num_bits - 1 of `words`, which are 0, to those of `plane`.
void copy_bits(Word* words, uint32_t offset, const Word* plane, uint32_t num_bits) {
  Word* target = words + offset / kWordBits;
  const uint32_t shift = offset % kWordBits, num_words = num_words_of(num_bits);
  if (shift == 0) {
    for (uint32_t i = 0; i < num_words; ++i) target[i] |= plane[i];
    return;
  }
  for (uint32_t i = 0; i < num_words; ++i) {
    target[i] |= plane[i] << shift;
    // The last word may not reach over, and there may be no word behind it.
    if (const Word over = plane[i] >> (kWordBits - shift)) target[i + 1] |= over;
  }
}

// For each byte, the numbers of its set bits, in front.
constexpr auto kBitNumbers = [] {
  std::array<std::array<int32_t, 8>, 256> table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0, next = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table[size_t(byte)][size_t(next++)] = bit;
    }
  }
  return table;
}();

// In byte i, the number of set bits of bytes 0 .. i.
uint64_t running_counts(Word word) {
  word -= word >> 1 & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
  return (word + (word >> 4) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u;
}

// Write the ids of the first `keep` set bits, or of all if there are fewer.
void write_ids(const Word* words, uint32_t num_words, uint32_t keep, int32_t* out) {
  int32_t* const end = out + keep;
  for (uint32_t index = 0; index < num_words && out < end; ++index) {
    Word rest = words[index];
    const int32_t first = int32_t(index * kWordBits);
    if (end - out >= kWordBits) {
      // Eight ids for each byte, of which the next byte overwrites those that are none.
      const uint64_t counts = running_counts(rest), starts = counts << 8;
      for (int byte = 0; byte < 8; ++byte) {
        const auto& numbers = kBitNumbers[rest >> (8 * byte) & 0xFF];
        int32_t* const place = out + (starts >> (8 * byte) & 0xFF);
        for (int i = 0; i < 8; ++i) place[i] = first + 8 * byte + numbers[size_t(i)];
      }
      out += counts >> 56;
    } else {
      for (; rest && out < end; rest &= rest - 1) *out++ = first + __builtin_ctzll(rest);
    }
  }
}

// Clear all but the first `keep` set bits.
void keep_first(Word* words, uint32_t num_words, uint32_t keep) {
  for (uint32_t index = 0; index < num_words; ++index) {
    while (count_bits(words[index]) > keep) words[index] &= ~(Word(1) << (63 - __builtin_clzll(words[index])));
    keep -= count_bits(words[index]);
  }
}

// Draws masks one after another; keeps its memory.
class Painter {
 public:
  explicit Painter(const Problem& problem)
      : problem_(problem),
        grid_(problem.grid),
        num_words_(num_words_of(grid_.tokens())),
        context_(num_words_),
        target_(num_words_),
        plane_(num_words_of(grid_.places())) {}

  // Draw one mask of one sample; returns the length of its context.
  uint32_t draw(uint32_t mask, const Draw& draw) {
    const MaskRow& row = problem_.rows[mask];
    uint32_t count = 0;
    if (row.strategy == kMultiblock) {
      const Grid size = block_size_of(mask, draw);
      for (uint32_t attempt = 0; attempt < kMaxAttempts && count == 0; ++attempt) {
        paint_blocks(row, size, draw, attempt);
        count = finish(row);
      }
    } else {
      paint_by_ratio(row, draw);
      count = finish(row);
    }
    if (count) return count;
    std::fill(context_.begin(), context_.end(), 0);
    context_[0] = 1;
    return 1;
  }

  // Write the ids of the mask drawn last. `final` are lengths that it can have.
  void write(const MaskRow& row, const Lengths& final, int32_t* context_ids, int32_t* target_ids) {
    const Kept kept = kept_before_swap(row, final);
    for (uint32_t i = 0; i < num_words_; ++i) target_[i] = ~context_[i] & word_below(grid_.tokens(), i);
    if (row.complement == kFullComplement) {
      keep_first(context_.data(), num_words_, kept.context);
      for (uint32_t i = 0; i < num_words_; ++i) target_[i] = ~context_[i] & word_below(grid_.tokens(), i);
    } else if (row.complement == kPredFullComplement) {
      keep_first(target_.data(), num_words_, kept.target);
      for (uint32_t i = 0; i < num_words_; ++i) context_[i] = ~target_[i] & word_below(grid_.tokens(), i);
    }
    write_ids(context_.data(), num_words_, kept.context, kept.swapped ? target_ids : context_ids);
    write_ids(target_.data(), num_words_, kept.target, kept.swapped ? context_ids : target_ids);
  }

 private:
  // The size is the same for all samples of a step.
  Grid block_size_of(uint32_t mask, const Draw& draw) {
    if (sized_mask_ != mask) {
      size_ = block_size(problem_.rows[mask], grid_, draw);
      sized_mask_ = mask;
    }
    return size_;
  }

  // Turn painted targets into the context; returns its length.
  uint32_t finish(const MaskRow& row) {
    const uint32_t limit = row.max_context_frames * grid_.places();
    uint32_t count = 0;
    for (uint32_t i = 0; i < num_words_; ++i) {
      context_[i] = ~target_[i] & word_below(limit, i);
      count += count_bits(context_[i]);
    }
    return count;
  }

  void paint_blocks(const MaskRow& row, const Grid& size, const Draw& draw, uint32_t attempt) {
    std::fill(target_.begin(), target_.end(), 0);
    origins_.resize(row.num_blocks);
    // Frames at which the set of blocks changes.
    changes_.assign({0, grid_.frames});
    for (uint32_t i = 0; i < row.num_blocks; ++i) {
      origins_[i] = block_origin(draw, grid_, size, attempt, i);
      if (size.frames < grid_.frames) {
        changes_.push_back(origins_[i].start);
        changes_.push_back(origins_[i].start + size.frames);
      }
    }
    std::sort(changes_.begin(), changes_.end());
    for (size_t change = 0; change + 1 < changes_.size(); ++change) {
      const uint32_t begin = changes_[change], end = changes_[change + 1];
      if (begin == end) continue;
      std::fill(plane_.begin(), plane_.end(), 0);
      for (const Origin& origin : origins_) {
        if (origin.start > begin || begin >= origin.start + size.frames) continue;
        for (uint32_t y = origin.top; y < origin.top + size.height; ++y) {
          const uint32_t first = y * grid_.width + origin.left;
          set_bits(plane_.data(), first, first + size.width);
        }
      }
      copy_plane(begin, end);
    }
  }

  void copy_plane(uint32_t begin_frame, uint32_t end_frame) {
    for (uint32_t frame = begin_frame; frame < end_frame; ++frame) {
      copy_bits(target_.data(), frame * grid_.places(), plane_.data(), grid_.places());
    }
  }

  void paint_by_ratio(const MaskRow& row, const Draw& draw) {
    std::fill(target_.begin(), target_.end(), 0);
    const ByRatio chosen = by_ratio(row, grid_, draw);
    if (chosen.in_frames) {
      const uint32_t begin = chosen.begin_frame * grid_.places();
      set_bits(target_.data(), begin, begin + chosen.count * grid_.places());
      return;
    }
    const uint32_t frames_each = chosen.num_subsets == 1 ? grid_.frames : 1;
    keys_.resize(grid_.places());
    for (uint32_t subset = 0; subset < chosen.num_subsets; ++subset) {
      std::fill(plane_.begin(), plane_.end(), 0);
      for (uint32_t place = 0; place < grid_.places(); place += 4) {
        const Words r = draw.words(kMaskPatches, subset, place / 4);
        const uint32_t end = std::min(place + 4, grid_.places());
        for (uint32_t i = place; i < end; ++i) keys_[i] = place_key(r.word[i - place], i);
      }
      std::nth_element(keys_.begin(), keys_.begin() + chosen.count, keys_.end());
      for (uint32_t i = 0; i < chosen.count; ++i) {
        const uint32_t place = uint32_t(keys_[i] % kMaxPlaces);
        plane_[place / kWordBits] |= Word(1) << (place % kWordBits);
      }
      copy_plane(subset * frames_each, (subset + 1) * frames_each);
    }
  }

  const Problem& problem_;
  const Grid grid_;
  const uint32_t num_words_;
  std::vector<Word> context_, target_, plane_;
  std::vector<Origin> origins_;
  std::vector<uint32_t> changes_;
  std::vector<uint64_t> keys_;
  Grid size_{};
  uint32_t sized_mask_ = kMaxMasks;
};

// Calls f(painter, mask, number, draw) for every mask of every sample.
template <class Function>
void for_each_mask(const Problem& problem, uint32_t step, const int64_t* samples, int64_t num_samples,
                   const Function& f) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask / problem.grid.tokens());
  torch::stable::parallel_for(0, problem.num_masks * num_samples, grain, [&](int64_t begin, int64_t end) {
    Painter painter(problem);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const auto mask = uint32_t(sequence / num_samples), number = uint32_t(sequence % num_samples);
      f(painter, mask, number, Draw{problem.key, uint64_t(samples[number]), step, problem.group, mask});
    }
  });
}

void check_samples(const char* name, const int64_t* samples, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    check(samples[i] >= 0, name, " holds ", samples[i], "; global sample numbers count from 0");
  }
}

Tensor mask_lengths_cpu(const Tensor& step, const Tensor& sample_ids, const Tensor& members,
                        std::vector<int64_t> specs, std::vector<int64_t> grid, int64_t seed, int64_t group,
                        int64_t group_size) {
  const Problem problem = make_problem(step, sample_ids, specs, grid, seed, group);
  check_members(problem, members, step, group_size);
  const int64_t num_samples = sample_ids.numel(), num_members = members.numel(), num_masks = problem.num_masks;
  const auto* samples = sample_ids.const_data_ptr<int64_t>();
  const auto* given = members.const_data_ptr<int64_t>();
  check_samples("sample_ids", samples, num_samples);
  check_samples("members", given, num_members);

  // Sorted, so that a truncation group is a run.
  std::vector<int64_t> sorted(given, given + num_members);
  if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
  std::vector<uint32_t> counts(size_t(num_masks * num_members));
  for_each_mask(problem, uint32_t(*step.const_data_ptr<int64_t>()), sorted.data(), num_members,
                [&](Painter& painter, uint32_t mask, uint32_t number, const Draw& draw) {
                  counts[size_t(mask * num_members + number)] = painter.draw(mask, draw);
                });
  const auto part_of = [&](int64_t sample) {
    return group_size == 0 ? sample : group_size < 0 ? 0 : sample / group_size;
  };
  std::vector<Lengths> of_member(counts.size());
  for (int64_t mask = 0; mask < num_masks; ++mask) {
    const uint32_t* own = counts.data() + mask * num_members;
    for (int64_t begin = 0, end; begin < num_members; begin = end) {
      for (end = begin + 1; end < num_members && part_of(sorted[size_t(end)]) == part_of(sorted[size_t(begin)]);) ++end;
      const auto [least, most] = std::minmax_element(own + begin, own + end);
      const uint32_t num_tokens = problem.grid.tokens();
      const Lengths lengths = final_lengths(problem.rows[mask], num_tokens, *least, num_tokens - *most);
      std::fill(of_member.begin() + mask * num_members + begin, of_member.begin() + mask * num_members + end, lengths);
    }
  }
  Tensor out = torch::stable::new_empty(sample_ids, {2, num_masks * num_samples}, ScalarType::Int);
  auto* lengths = out.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < num_samples; ++i) {
    const auto place = std::lower_bound(sorted.begin(), sorted.end(), samples[i]);
    check(place != sorted.end() && *place == samples[i], "sample ", samples[i],
          " is not among the members; members are all samples of the truncation groups of sample_ids");
    for (int64_t mask = 0; mask < num_masks; ++mask) {
      const Lengths& found = of_member[size_t(mask * num_members + (place - sorted.begin()))];
      lengths[mask * num_samples + i] = int32_t(found.context);
      lengths[(num_masks + mask) * num_samples + i] = int32_t(found.target);
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_sample_cpu(const Tensor& step, const Tensor& sample_ids,
                                                           const Tensor& lengths, std::vector<int64_t> specs,
                                                           std::vector<int64_t> grid, int64_t seed, int64_t group,
                                                           int64_t capacity_context, int64_t capacity_target) {
  const Problem problem = make_problem(step, sample_ids, specs, grid, seed, group);
  check_sample_arguments(problem, step, sample_ids, lengths, capacity_context, capacity_target);
  const int64_t num_samples = sample_ids.numel(), num_sequences = problem.num_masks * num_samples;
  const auto* samples = sample_ids.const_data_ptr<int64_t>();
  check_samples("sample_ids", samples, num_samples);
  const auto* given = lengths.const_data_ptr<int32_t>();

  Tensor cu_seqlens = torch::stable::new_empty(sample_ids, {3, num_sequences + 1}, ScalarType::Int);
  Tensor totals = torch::stable::new_empty(sample_ids, {2}, ScalarType::Int);
  std::array<int32_t*, 3> ends;
  for (int64_t kind = 0; kind < 3; ++kind) {
    ends[size_t(kind)] = cu_seqlens.mutable_data_ptr<int32_t>() + kind * (num_sequences + 1);
    *ends[size_t(kind)] = 0;
  }
  for (int64_t s = 0; s < num_sequences; ++s) {
    for (size_t kind = 0; kind < 2; ++kind) {
      const int32_t length = given[int64_t(kind) * num_sequences + s];
      check_range("an entry of lengths", length, 0, problem.grid.tokens());
      ends[kind][s + 1] = ends[kind][s] + length;
    }
    check_range("context and target of a sequence in lengths", int64_t(given[s]) + given[num_sequences + s], 0,
                problem.grid.tokens());
    ends[2][s + 1] = ends[0][s + 1] + ends[1][s + 1];
  }
  const int64_t capacities[2] = {capacity_context, capacity_target};
  const char* names[2] = {"context", "target"};
  std::array<Tensor, 2> ids;
  std::array<int32_t*, 2> out;
  for (size_t kind = 0; kind < 2; ++kind) {
    const int64_t total = ends[kind][num_sequences];
    check(total <= capacities[kind], "the masks hold ", total, " ", names[kind], " tokens, more than capacity_",
          names[kind], " ", capacities[kind]);
    totals.mutable_data_ptr<int32_t>()[kind] = int32_t(total);
    ids[kind] = torch::stable::new_empty(sample_ids, {capacities[kind]}, ScalarType::Int);
    out[kind] = ids[kind].mutable_data_ptr<int32_t>();
    std::fill(out[kind] + total, out[kind] + capacities[kind], 0);
  }
  std::atomic<int64_t> unfit{-1};
  for_each_mask(problem, uint32_t(*step.const_data_ptr<int64_t>()), samples, num_samples,
                [&](Painter& painter, uint32_t mask, uint32_t number, const Draw& draw) {
                  const int64_t s = mask * num_samples + number;
                  const MaskRow& row = problem.rows[mask];
                  const uint32_t num_context = painter.draw(mask, draw);
                  const Lengths final = {uint32_t(given[s]), uint32_t(given[num_sequences + s])};
                  const Kept kept = kept_before_swap(row, final);
                  const uint32_t num_target = problem.grid.tokens() - num_context;
                  // Only lengths that keep the first of what there is, and all of it behind a complement, are written.
                  const bool one_list = row.complement != kNoComplement;
                  const bool context_fits = row.complement == kPredFullComplement || kept.context <= num_context;
                  const bool target_fits = row.complement == kFullComplement || kept.target <= num_target;
                  if (!context_fits || !target_fits ||
                      (one_list && kept.context + kept.target != problem.grid.tokens())) {
                    unfit = s;
                    return;
                  }
                  painter.write(row, final, out[0] + ends[0][s], out[1] + ends[1][s]);
                });
  check(unfit < 0, "lengths do not belong to the masks of sequence ", unfit.load(),
        "; take them from mask_lengths with the same step, samples, specs, grid, seed and group");
  return {ids[0], ids[1], cu_seqlens, totals};
}

Tensor philox4x32_cpu(const Tensor& counter, int64_t key_0, int64_t key_1) {
  check_philox_counter(counter);
  Tensor out = torch::stable::new_empty(counter, {counter.size(0), 4}, ScalarType::Long);
  const auto* in = counter.const_data_ptr<int64_t>();
  auto* words = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < counter.numel(); i += 4) {
    const Words r = philox4x32({{uint32_t(in[i]), uint32_t(in[i + 1]), uint32_t(in[i + 2]), uint32_t(in[i + 3])}},
                               {uint32_t(key_0), uint32_t(key_1)});
    for (int64_t j = 0; j < 4; ++j) words[i + j] = r.word[j];
  }
  return out;
}

}  // namespace
}  // namespace vjepa_fast

// A fragment, because other operators of the package may be defined elsewhere.
STABLE_TORCH_LIBRARY_FRAGMENT(vjepa_fast, m) {
  m.def(
      "mask_lengths(Tensor step, Tensor sample_ids, Tensor members, int[] specs, int[] grid, int seed, int group, "
      "int group_size) -> Tensor");
  m.def(
      "mask_sample(Tensor step, Tensor sample_ids, Tensor lengths, int[] specs, int[] grid, int seed, int group, "
      "SymInt capacity_context, SymInt capacity_target) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("philox4x32(Tensor counter, int key_0, int key_1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vjepa_fast, CPU, m) {
  m.impl("mask_lengths", TORCH_BOX(&vjepa_fast::mask_lengths_cpu));
  m.impl("mask_sample", TORCH_BOX(&vjepa_fast::mask_sample_cpu));
  m.impl("philox4x32", TORCH_BOX(&vjepa_fast::philox4x32_cpu));
}
