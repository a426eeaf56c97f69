// Schema of the pixel operator, and what it does on the CPU: row by row, the vertical pass first.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "clip_pixels.h"
#include "clip_pixels_args.h"

namespace vjepa_fast {
namespace {

// Output rows that make a task worth a thread.
constexpr int64_t kRowsPerTask = 64;

// Where the columns of one component come from, relative to the first one that is needed. A weight is a pair: that of
// the column itself, and above it that of the column behind.
struct Columns {
  int32_t begin, count;
  std::vector<int32_t> first, weights;

  explicit Columns(const Axis& axis) : first(size_t(axis.size)), weights(size_t(axis.size)) {
    for (int32_t i = 0; i < axis.size; ++i) {
      const Tap tap = tap_of(axis, i);
      first[size_t(i)] = tap.first;
      weights[size_t(i)] = (kWeightOne - tap.weight) | tap.weight << 16;
    }
    const auto [least, most] = std::minmax_element(first.begin(), first.end());
    begin = *least;
    count = std::min(*most + 2, axis.extent) - begin;
    for (int32_t& place : first) place -= begin;
  }
};

// The vertical pass of one row: out[i] for `count` columns from `above` and `below`. One more is 0, so that the last
// sample has a neighbour, whose weight is 0.
template <typename Sample>
void blend_row(const Sample* __restrict above, const Sample* __restrict below, int64_t stride, int32_t count,
               int32_t weight, int32_t depth, int16_t* __restrict out) {
  if (stride == 1) {
    for (int32_t i = 0; i < count; ++i) out[i] = int16_t(blend_down(above[i], below[i], weight, depth));
  } else {
    for (int32_t i = 0; i < count; ++i) {
      out[i] = int16_t(blend_down(above[i * stride], below[i * stride], weight, depth));
    }
  }
  out[count] = 0;
}

#if defined(__SSE2__)
// Two neighbours are one word of 32 bits: compilers do not find that, and it makes the pass five times as fast.
__m128i blend_four(const int16_t* row, const int32_t* first, const int32_t* weights) {
  int32_t pairs[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&pairs[i], row + first[i], sizeof(pairs[i]));
  const __m128i samples = _mm_set_epi32(pairs[3], pairs[2], pairs[1], pairs[0]);
  const __m128i sum = _mm_madd_epi16(samples, _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
  return _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(kWeightOne / 2)), kWeightBits);
}
#endif

// The horizontal pass of one row.
void blend_columns(const int16_t* row, const Columns& columns, int32_t size, int16_t* out) {
  const int32_t* first = columns.first.data();
  const int32_t* weights = columns.weights.data();
  int32_t i = 0;
#if defined(__SSE2__)
  for (; i + 8 <= size; i += 8) {
    const __m128i left = blend_four(row, first + i, weights + i);
    const __m128i right = blend_four(row, first + i + 4, weights + i + 4);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_packs_epi32(left, right));
  }
#endif
  for (; i < size; ++i) {
    const int16_t* pair = row + first[i];
    out[i] = int16_t(blend_across(pair[0], pair[1], weights[i] >> 16));
  }
}

void write_row(const Colour& colour, const int16_t* __restrict y, const int16_t* __restrict u,
               const int16_t* __restrict v, int32_t size, uint8_t* __restrict out) {
  for (int32_t i = 0; i < size; ++i) {
    for (int c = 0; c < 3; ++c) out[3 * i + c] = channel_of(colour, c, y[i], u[i], v[i]);
  }
}

template <typename Sample>
void clip_pixels_rows(const Job& job, int64_t begin, int64_t end) {
  const Columns columns[2] = {Columns(job.columns[0]), Columns(job.columns[1])};
  const int32_t height = job.rows[0].size, width = job.columns[0].size;
  std::vector<int16_t> blended(size_t(std::max(columns[0].count, columns[1].count)) + 1);
  std::vector<int16_t> samples(size_t(width) * 3);
  for (int64_t row = begin; row < end; ++row) {
    const auto frame = int32_t(row / height), y = int32_t(row % height);
    for (int c = 0; c < 3; ++c) {
      const Plane& plane = job.planes[c];
      const Axis& axis = job.rows[c > 0];
      const Columns& own = columns[c > 0];
      const Tap tap = tap_of(axis, y);
      const Sample* above = static_cast<const Sample*>(plane.data) + frame * plane.frame_stride +
                            tap.first * plane.row_stride + own.begin * plane.column_stride;
      const Sample* below = tap.first + 1 < axis.extent ? above + plane.row_stride : above;
      blend_row(above, below, plane.column_stride, own.count, tap.weight, job.depth, blended.data());
      blend_columns(blended.data(), own, width, samples.data() + size_t(c) * size_t(width));
    }
    const int16_t* own = samples.data();
    write_row(job.colour, own, own + width, own + 2 * size_t(width), width, job.out + row * width * 3);
  }
}

Tensor clip_pixels_cpu(const Tensor& y, const Tensor& u, const Tensor& v, std::vector<int64_t> box,
                       std::vector<int64_t> size, bool flip, int64_t depth, std::vector<int64_t> chroma,
                       std::vector<int64_t> colour) {
  Job job = make_job(y, u, v, box, size, flip, depth, chroma, colour);
  Tensor out = torch::stable::new_empty(y, {y.size(0), size[0], size[1], 3}, ScalarType::Byte);
  job.out = out.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, y.size(0) * size[0], kRowsPerTask, [&](int64_t begin, int64_t end) {
    if (y.scalar_type() == ScalarType::Byte) {
      clip_pixels_rows<uint8_t>(job, begin, end);
    } else {
      clip_pixels_rows<uint16_t>(job, begin, end);
    }
  });
  return out;
}

}  // namespace
}  // namespace vjepa_fast

STABLE_TORCH_LIBRARY_FRAGMENT(vjepa_fast, m) {
  m.def(
      "clip_pixels(Tensor y, Tensor u, Tensor v, int[] box, SymInt[] size, bool flip, int depth, int[] chroma, "
      "int[] colour) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vjepa_fast, CPU, m) {
  m.impl("clip_pixels", TORCH_BOX(&vjepa_fast::clip_pixels_cpu));
}
