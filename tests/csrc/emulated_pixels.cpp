// The CUDA kernel of csrc/clip_pixels.h on the CPU: its grid of threads, one after another. Built and called by
// tests/ops/test_clip_pixels.py and tests/csrc/fuzz_pixels.py.

#include <cstdint>

#include "../../csrc/clip_pixels.h"

using namespace vjepa_fast;

// planes: three pointers; strides: frame, row and column of each; extents: luma rows, columns, chroma rows, columns.
extern "C" void emulated_pixels(const void* const* planes, const int64_t* strides, const int64_t* extents,
                                int64_t num_frames, const int64_t* box, const int64_t* size, int64_t flip,
                                int64_t depth, int64_t is_wide, const int64_t* chroma, const int64_t* colour,
                                int64_t block, uint8_t* out) {
  Job job;
  for (int c = 0; c < 3; ++c) job.planes[c] = {planes[c], strides[3 * c], strides[3 * c + 1], strides[3 * c + 2]};
  for (int axis = 0; axis < 2; ++axis) {
    Axis* axes = axis ? job.columns : job.rows;
    axes[0] = {int32_t(box[axis]), int32_t(box[2 + axis]), int32_t(size[axis]), axis == 1 && flip, 1, 0,
               int32_t(extents[axis])};
    axes[1] = axes[0];
    axes[1].step = int32_t(chroma[axis]);
    axes[1].site = int32_t(chroma[2 + axis]);
    axes[1].extent = int32_t(extents[2 + axis]);
  }
  for (int i = 0; i < 9; ++i) job.colour.rows[i / 3][i % 3] = int32_t(colour[i]);
  for (int i = 0; i < 3; ++i) job.colour.offsets[i] = int32_t(colour[9 + i]);
  job.depth = int32_t(depth);
  job.num_frames = int32_t(num_frames);
  job.out = out;
  const int64_t num_blocks = (threads_per_frame(job) + block - 1) / block;
  for (int32_t group = frame_groups(job); group-- > 0;) {
    for (int64_t thread = num_blocks * block; thread-- > 0;) {
      if (is_wide) {
        clip_pixels_thread<uint16_t>(job, thread, group);
      } else {
        clip_pixels_thread<uint8_t>(job, thread, group);
      }
    }
  }
}
