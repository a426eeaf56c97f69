// Arguments of the pixel operator: every one is checked here, for both devices, so that whatever comes from Python ends
// in a message or in a clip.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "checks.h"
#include "clip_pixels.h"

namespace vjepa_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_component(const char* name, const Tensor& tensor, const Tensor& y) {
  check(tensor.scalar_type() == y.scalar_type(), name, " has dtype ",
        torch::headeronly::toString(tensor.scalar_type()), ", y has ", torch::headeronly::toString(y.scalar_type()),
        "; expected the same");
  check(tensor.is_cuda() == y.is_cuda() && tensor.get_device_index() == y.get_device_index(), name,
        " is on another device than y; put them on the same one");
  check(tensor.dim() == 3, name, " has ", tensor.dim(), " dimensions; expected frames, rows and columns");
  check(tensor.size(0) == y.size(0), name, " has ", tensor.size(0), " frames, y has ", y.size(0));
  check_range("rows of a component", tensor.size(1), 1, kMaxSide);
  check_range("columns of a component", tensor.size(2), 1, kMaxSide);
}

inline void check_length(const char* name, const std::vector<int64_t>& values, size_t length) {
  check(values.size() == length, name, " has ", values.size(), " integers; expected ", length);
}

// Everything but `out`.
inline Job make_job(const Tensor& y, const Tensor& u, const Tensor& v, const std::vector<int64_t>& box,
                    const std::vector<int64_t>& size, bool flip, int64_t depth, const std::vector<int64_t>& chroma,
                    const std::vector<int64_t>& colour) {
  check(y.scalar_type() == ScalarType::Byte || y.scalar_type() == ScalarType::UInt16, "y has dtype ",
        torch::headeronly::toString(y.scalar_type()), "; expected Byte or UInt16");
  check_component("y", y, y);
  check_component("u", u, y);
  check_component("v", v, y);
  check(u.size(1) == v.size(1) && u.size(2) == v.size(2), "u and v differ in rows or columns");
  check_length("box", box, 4);
  check_length("size", size, 2);
  check_length("chroma", chroma, 4);
  check_length("colour", colour, 12);
  check_range("depth", depth, kMinDepth, y.scalar_type() == ScalarType::Byte ? kMinDepth : kMaxDepth);
  check_range("number of frames", y.size(0), 0, std::numeric_limits<int32_t>::max());
  Job job;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t extent = y.size(1 + axis), begin = box[axis], length = box[2 + axis];
    check_range(axis ? "left of box" : "top of box", begin, 0, extent - 1);
    check_range(axis ? "width of box" : "height of box", length, 1, extent - begin);
    check_range("a side of size", size[axis], 1, kMaxSide);
    check_range("a subsampling of chroma", chroma[axis], 1, 4);
    check_range("a site of chroma", chroma[2 + axis], 0, 8);
    Axis luma{int32_t(begin), int32_t(length), int32_t(size[axis]), axis == 1 && flip, 1, 0, int32_t(extent)};
    (axis ? job.columns : job.rows)[0] = luma;
    luma.step = int32_t(chroma[axis]);
    luma.site = int32_t(chroma[2 + axis]);
    luma.extent = int32_t(u.size(1 + axis));
    (axis ? job.columns : job.rows)[1] = luma;
  }
  for (int channel = 0; channel < 3; ++channel) {
    constexpr int64_t largest = std::numeric_limits<int32_t>::max();
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) {
      const int64_t value = i < 3 ? colour[channel * 3 + i] : colour[9 + channel];
      check_range("an entry of colour", value, -largest, largest);
      sum += (value < 0 ? -value : value) * (i < 3 ? kLargestSample : 1);
      (i < 3 ? job.colour.rows[channel][i] : job.colour.offsets[channel]) = int32_t(value);
    }
    check(sum <= largest, "the entries of colour for channel ", channel, " add up to ", sum, " at the largest sample, ",
          largest, ", the most that 32 bits hold; expected less");
  }
  const Tensor* tensors[3] = {&y, &u, &v};
  for (int c = 0; c < 3; ++c) {
    const Tensor& tensor = *tensors[c];
    job.planes[c] = {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  job.depth = int32_t(depth);
  job.num_frames = int32_t(y.size(0));
  return job;
}

}  // namespace vjepa_fast
