// PyTorch's current stream, for the launches of all kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// Weak: a PyTorch without CUDA does not have them, and the library has to load there too.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace vjepa_fast {

inline cudaStream_t stream_of(const torch::stable::Tensor& tensor) {
  // PyTorch's guard sets the device of its own runtime; the one linked into this library is another.
  STD_CUDA_CHECK(cudaSetDevice(tensor.get_device_index()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vjepa_fast
