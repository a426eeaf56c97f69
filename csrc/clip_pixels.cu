// CUDA kernel of the pixel operator: a shell around what one thread does in clip_pixels.h.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "clip_pixels.h"
#include "clip_pixels_args.h"
#include "stream.h"

namespace vjepa_fast {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kBlocksPerMultiprocessor = 4;

template <typename Sample>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    clip_pixels_kernel(const __grid_constant__ Job job) {
  clip_pixels_thread<Sample>(job, int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int32_t(blockIdx.y));
}

Tensor clip_pixels_cuda(const Tensor& y, const Tensor& u, const Tensor& v, std::vector<int64_t> box,
                        std::vector<int64_t> size, bool flip, int64_t depth, std::vector<int64_t> chroma,
                        std::vector<int64_t> colour) {
  check(y.is_cuda(), "y is not on the GPU, but another argument is");
  Job job = make_job(y, u, v, box, size, flip, depth, chroma, colour);
  // blockIdx.y has 16 bits.
  check_range("number of frames", y.size(0), 0, int64_t(kFramesPerThread) * 65535);
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::new_empty(y, {y.size(0), size[0], size[1], 3}, ScalarType::Byte);
  job.out = out.mutable_data_ptr<uint8_t>();
  if (y.size(0) == 0) return out;
  const dim3 grid(uint32_t((threads_per_frame(job) + kThreads - 1) / kThreads), uint32_t(frame_groups(job)));
  const cudaStream_t stream = stream_of(y);
  if (y.scalar_type() == ScalarType::Byte) {
    clip_pixels_kernel<uint8_t><<<grid, kThreads, 0, stream>>>(job);
  } else {
    clip_pixels_kernel<uint16_t><<<grid, kThreads, 0, stream>>>(job);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace vjepa_fast

STABLE_TORCH_LIBRARY_IMPL(vjepa_fast, CUDA, m) {
  m.impl("clip_pixels", TORCH_BOX(&vjepa_fast::clip_pixels_cuda));
}
