// One pixel of a clip out of the planes of its frames: crop, bilinear resize, flip and colour conversion, for host and
// device.
//
// The rules are those in the docstring of vjepa_fast/ops/clip_pixels.py, and the two must give the same bits. Only
// integers occur, so no compiler, device or order of execution can change a pixel.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vjepa_fast {

constexpr int kWeightBits = 11;
constexpr int32_t kWeightOne = 1 << kWeightBits;
constexpr int kSampleBits = 15;  // of an interpolated sample: 8, and 7 of fraction
constexpr int32_t kLargestSample = (1 << kSampleBits) - 1;
constexpr int kColourShift = 20;  // those 7, and 13 of the coefficients
constexpr int kMinDepth = 8, kMaxDepth = 14;
constexpr int64_t kMaxSide = 1 << 15;

// How one component (luma or chroma) is sampled along one axis.
struct Axis {
  int32_t begin, length;  // of the box, in luma samples
  int32_t size;           // of the output
  int32_t flip;
  int32_t step, site;  // luma samples to a sample; place of the first one, in halves of a luma sample
  int32_t extent;      // samples there are
};

// Between `first` and the sample behind it, `weight` of kWeightOne of the way; at the last sample the weight is 0.
struct Tap {
  int32_t first, weight;
};

VF_HD Tap tap_of(const Axis& axis, int32_t index) {
  const int64_t i = axis.flip ? axis.size - 1 - index : index, twice = 2 * int64_t(axis.size);
  // Places are in units of 1 / twice of a luma sample, then of 1 / (twice * step) of one's own.
  const int64_t last_in_box = twice * (axis.length - 1);
  int64_t place = (2 * i + 1) * axis.length - axis.size;
  place = place < 0 ? 0 : place > last_in_box ? last_in_box : place;
  place += twice * axis.begin - int64_t(axis.site) * axis.size;
  const int64_t unit = twice * axis.step, last = unit * (axis.extent - 1);
  place = place < 0 ? 0 : place > last ? last : place;
  const int64_t steps = (place * kWeightOne + unit / 2) / unit;
  return {int32_t(steps >> kWeightBits), int32_t(steps & (kWeightOne - 1))};
}

// Two samples of one column. Those that are larger than their depth allows count as the largest one.
template <typename Sample>
VF_HD int32_t blend_down(Sample above, Sample below, int32_t weight, int32_t depth) {
  int32_t a = above, b = below;
  if constexpr (sizeof(Sample) > 1) {
    const int32_t largest = (1 << depth) - 1;
    a = a < largest ? a : largest;
    b = b < largest ? b : largest;
  }
  const int shift = depth + kWeightBits - kSampleBits;
  return (a * (kWeightOne - weight) + b * weight + (1 << (shift - 1))) >> shift;
}

// Two neighbours of one row, both already blended.
VF_HD int32_t blend_across(int32_t left, int32_t right, int32_t weight) {
  return (left * (kWeightOne - weight) + right * weight + kWeightOne / 2) >> kWeightBits;
}

// From the three components to red, green and blue: a row of coefficients and an offset for each.
struct Colour {
  int32_t rows[3][3];
  int32_t offsets[3];
};

VF_HD uint8_t channel_of(const Colour& colour, int channel, int32_t y, int32_t u, int32_t v) {
  const int32_t* row = colour.rows[channel];
  const int32_t value = (row[0] * y + row[1] * u + row[2] * v + colour.offsets[channel]) >> kColourShift;
  return uint8_t(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Samples of one component; strides in samples.
struct Plane {
  const void* data;
  int64_t frame_stride, row_stride, column_stride;
};

struct Job {
  Plane planes[3];
  Axis rows[2], columns[2];  // luma, chroma
  Colour colour;
  int32_t depth;
  int32_t num_frames;
  uint8_t* out;  // [num_frames, rows[0].size, columns[0].size, 3]
};

constexpr int32_t kPixelsPerThread = 4;
constexpr int32_t kFramesPerThread = 4;

VF_HD int64_t threads_per_frame(const Job& job) {
  return int64_t(job.rows[0].size) * ((job.columns[0].size + kPixelsPerThread - 1) / kPixelsPerThread);
}

VF_HD int32_t frame_groups(const Job& job) { return (job.num_frames + kFramesPerThread - 1) / kFramesPerThread; }

template <typename Sample>
VF_HD int32_t sample_at(const Plane& plane, int32_t frame, const Tap& row, const Tap& column, const Axis& rows,
                        const Axis& columns, int32_t depth) {
  const Sample* above = static_cast<const Sample*>(plane.data) + frame * plane.frame_stride +
                        row.first * plane.row_stride + column.first * plane.column_stride;
  const int64_t down = row.first + 1 < rows.extent ? plane.row_stride : 0;
  const int64_t across = column.first + 1 < columns.extent ? plane.column_stride : 0;
  const int32_t left = blend_down(above[0], above[down], row.weight, depth);
  const int32_t right = blend_down(above[across], above[across + down], row.weight, depth);
  return blend_across(left, right, column.weight);
}

// What one GPU thread does: neighbouring pixels of one row, in some frames, so that places are computed once and the
// threads of a warp read and write what lies side by side.
template <typename Sample>
VF_HD void clip_pixels_thread(const Job& job, int64_t thread, int32_t frame_group) {
  if (thread >= threads_per_frame(job)) return;
  const int32_t width = job.columns[0].size, per_row = (width + kPixelsPerThread - 1) / kPixelsPerThread;
  const int32_t y = int32_t(thread / per_row), left = int32_t(thread % per_row) * kPixelsPerThread;
  const Tap row = tap_of(job.rows[0], y), chroma_row = tap_of(job.rows[1], y);
  Tap columns[kPixelsPerThread], chroma_columns[kPixelsPerThread];
  for (int32_t i = 0; i < kPixelsPerThread; ++i) {
    const int32_t x = left + i < width ? left + i : width - 1;
    columns[i] = tap_of(job.columns[0], x);
    chroma_columns[i] = tap_of(job.columns[1], x);
  }
  const int32_t begin = frame_group * kFramesPerThread;
  const int32_t end = begin + kFramesPerThread < job.num_frames ? begin + kFramesPerThread : job.num_frames;
  for (int32_t frame = begin; frame < end; ++frame) {
    // The pixels as they lie in memory, the first byte lowest.
    uint32_t words[3 * kPixelsPerThread / 4] = {};
    for (int32_t i = 0; i < kPixelsPerThread; ++i) {
      int32_t samples[3];
      for (int c = 0; c < 3; ++c) {
        const Axis &rows_c = job.rows[c > 0], &columns_c = job.columns[c > 0];
        samples[c] = sample_at<Sample>(job.planes[c], frame, c ? chroma_row : row, c ? chroma_columns[i] : columns[i],
                                       rows_c, columns_c, job.depth);
      }
      for (int c = 0; c < 3; ++c) {
        const int32_t byte = 3 * i + c;
        words[byte / 4] |= uint32_t(channel_of(job.colour, c, samples[0], samples[1], samples[2])) << (byte % 4 * 8);
      }
    }
    uint8_t* out = job.out + 3 * ((int64_t(frame) * job.rows[0].size + y) * width + left);
    // Then every run of pixels begins at a multiple of four bytes.
    if (width % kPixelsPerThread == 0) {
      for (int32_t i = 0; i < 3 * kPixelsPerThread / 4; ++i) reinterpret_cast<uint32_t*>(out)[i] = words[i];
    } else {
      // A fixed number of turns, so that the words stay in registers.
      for (int32_t i = 0; i < 3 * kPixelsPerThread; ++i) {
        if (left + i / 3 < width) out[i] = uint8_t(words[i / 4] >> (i % 4 * 8));
      }
    }
  }
}

}  // namespace vjepa_fast
