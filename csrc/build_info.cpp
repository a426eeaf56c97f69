// What this library was built for, as JSON; vjepa_fast/extension.py reads it before anything is called.

extern "C" __attribute__((visibility("default"))) const char* vjepa_fast_build_info() {
  return "{\"version\": \"" VJEPA_FAST_VERSION "\", \"torch\": \"" VJEPA_FAST_TORCH
         "\", \"cuda_architectures\": \"" VJEPA_FAST_CUDA_ARCHITECTURES "\"}";
}
