// CUDA kernels of the mask operators: shells around the phases of mask_sampler.h.
//
// One block draws one mask of one sample, with its bitmap in shared memory. All memory comes from PyTorch's allocator,
// nothing is copied to the host, and the step is read on the device: the launches can be captured in a CUDA graph.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "mask_sampler.h"
#include "mask_sampler_args.h"
#include "stream.h"

namespace vjepa_fast {
namespace {

struct CudaBlock {
  template <class Function>
  __device__ void each(const Function& f) {
    f(threadIdx.x, blockDim.x);
    __syncthreads();
  }
};

// The bitmap is the dynamic shared memory of a launch.
extern __shared__ uint32_t bitmap[];

__global__ void __launch_bounds__(kMaxThreads)
    mask_sample_kernel(const __grid_constant__ Problem problem, const int64_t* step, const int64_t* sample_ids,
                       uint32_t batch_size, const int32_t* lengths, SampleOutputs out) {
  __shared__ Shared shared;
  CudaBlock block;
  sample_block(block, shared, bitmap, problem, uint32_t(*step), sample_ids, batch_size, lengths, blockIdx.x, out);
}

__global__ void __launch_bounds__(kMaxThreads)
    mask_count_kernel(const __grid_constant__ Problem problem, const int64_t* step, const int64_t* members,
                      uint32_t num_members, int32_t* context_counts) {
  __shared__ Shared shared;
  CudaBlock block;
  const uint32_t mask = blockIdx.x / num_members;
  const Draw draw = {problem.key, uint64_t(members[blockIdx.x % num_members]), uint32_t(*step), problem.group, mask};
  const uint32_t count = draw_mask(block, shared, bitmap, problem, problem.rows[mask], draw);
  if (threadIdx.x == 0) context_counts[blockIdx.x] = int32_t(count);
}

__global__ void __launch_bounds__(kMaxThreads)
    mask_lengths_kernel(const __grid_constant__ Problem problem, const int64_t* sample_ids, uint32_t batch_size,
                        const int64_t* members, uint32_t num_members, const int32_t* context_counts,
                        int64_t group_size, int32_t* lengths) {
  const uint32_t num_sequences = problem.num_masks * batch_size;
  const uint32_t sequence = blockIdx.x * blockDim.x + threadIdx.x;
  if (sequence >= num_sequences) return;
  const Lengths found = lengths_of_sequence(problem, members, num_members, context_counts, group_size,
                                            sequence / batch_size, sample_ids[sequence % batch_size]);
  lengths[sequence] = int32_t(found.context);
  lengths[num_sequences + sequence] = int32_t(found.target);
}

__global__ void philox4x32_kernel(const int64_t* counter, int64_t num_counters, Key key, int64_t* words) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num_counters) return;
  const int64_t* in = counter + 4 * i;
  const Words r = philox4x32({{uint32_t(in[0]), uint32_t(in[1]), uint32_t(in[2]), uint32_t(in[3])}}, key);
  for (int j = 0; j < 4; ++j) words[4 * i + j] = r.word[j];
}

size_t bitmap_bytes(const Problem& problem) { return (problem.grid.tokens() + 31) / 32 * sizeof(uint32_t); }

void check_step(const Tensor& step) { check(step.is_cuda(), "step is not on the GPU, but another argument is"); }

Tensor mask_lengths_cuda(const Tensor& step, const Tensor& sample_ids, const Tensor& members,
                         std::vector<int64_t> specs, std::vector<int64_t> grid, int64_t seed, int64_t group,
                         int64_t group_size) {
  check_step(step);
  const Problem problem = make_problem(step, sample_ids, specs, grid, seed, group);
  check_members(problem, members, step, group_size);
  const int64_t num_sequences = problem.num_masks * sample_ids.numel();
  const int64_t num_drawn = problem.num_masks * members.numel();
  torch::stable::accelerator::DeviceGuard guard(step.get_device_index());
  Tensor counts = torch::stable::new_empty(sample_ids, {num_drawn}, ScalarType::Int);
  Tensor lengths = torch::stable::new_empty(sample_ids, {2, num_sequences}, ScalarType::Int);
  if (num_sequences == 0) return lengths;
  const cudaStream_t stream = stream_of(step);
  if (num_drawn) {
    mask_count_kernel<<<uint32_t(num_drawn), kMaxThreads, bitmap_bytes(problem), stream>>>(
        problem, step.const_data_ptr<int64_t>(), members.const_data_ptr<int64_t>(), uint32_t(members.numel()),
        counts.mutable_data_ptr<int32_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  mask_lengths_kernel<<<uint32_t((num_sequences + kMaxThreads - 1) / kMaxThreads), kMaxThreads, 0, stream>>>(
      problem, sample_ids.const_data_ptr<int64_t>(), uint32_t(sample_ids.numel()), members.const_data_ptr<int64_t>(),
      uint32_t(members.numel()), counts.const_data_ptr<int32_t>(), group_size, lengths.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return lengths;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_sample_cuda(const Tensor& step, const Tensor& sample_ids,
                                                            const Tensor& lengths, std::vector<int64_t> specs,
                                                            std::vector<int64_t> grid, int64_t seed, int64_t group,
                                                            int64_t capacity_context, int64_t capacity_target) {
  check_step(step);
  const Problem problem = make_problem(step, sample_ids, specs, grid, seed, group);
  check_sample_arguments(problem, step, sample_ids, lengths, capacity_context, capacity_target);
  const int64_t num_sequences = problem.num_masks * sample_ids.numel();
  torch::stable::accelerator::DeviceGuard guard(step.get_device_index());
  Tensor context_ids = torch::stable::new_empty(sample_ids, {capacity_context}, ScalarType::Int);
  Tensor target_ids = torch::stable::new_empty(sample_ids, {capacity_target}, ScalarType::Int);
  Tensor cu_seqlens = torch::stable::new_empty(sample_ids, {3, num_sequences + 1}, ScalarType::Int);
  Tensor totals = torch::stable::new_empty(sample_ids, {2}, ScalarType::Int);
  const SampleOutputs out = {context_ids.mutable_data_ptr<int32_t>(), target_ids.mutable_data_ptr<int32_t>(),
                             cu_seqlens.mutable_data_ptr<int32_t>(), totals.mutable_data_ptr<int32_t>(),
                             uint32_t(capacity_context), uint32_t(capacity_target)};
  // Without sequences a block is still needed for the zeros.
  const uint32_t num_blocks = num_sequences ? uint32_t(num_sequences) : 1;
  mask_sample_kernel<<<num_blocks, kMaxThreads, bitmap_bytes(problem), stream_of(step)>>>(
      problem, step.const_data_ptr<int64_t>(), sample_ids.const_data_ptr<int64_t>(), uint32_t(sample_ids.numel()),
      lengths.const_data_ptr<int32_t>(), out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {context_ids, target_ids, cu_seqlens, totals};
}

Tensor philox4x32_cuda(const Tensor& counter, int64_t key_0, int64_t key_1) {
  check_philox_counter(counter);
  torch::stable::accelerator::DeviceGuard guard(counter.get_device_index());
  Tensor words = torch::stable::new_empty(counter, {counter.size(0), 4}, ScalarType::Long);
  if (counter.numel() == 0) return words;
  const int64_t num_blocks = (counter.size(0) + kMaxThreads - 1) / kMaxThreads;
  philox4x32_kernel<<<uint32_t(num_blocks), kMaxThreads, 0, stream_of(counter)>>>(
      counter.const_data_ptr<int64_t>(), counter.size(0), {uint32_t(key_0), uint32_t(key_1)},
      words.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return words;
}

}  // namespace
}  // namespace vjepa_fast

STABLE_TORCH_LIBRARY_IMPL(vjepa_fast, CUDA, m) {
  m.impl("mask_lengths", TORCH_BOX(&vjepa_fast::mask_lengths_cuda));
  m.impl("mask_sample", TORCH_BOX(&vjepa_fast::mask_sample_cuda));
  m.impl("philox4x32", TORCH_BOX(&vjepa_fast::philox4x32_cuda));
}
