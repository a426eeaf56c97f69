// Functions that are compiled for host and device.
#pragma once

#if defined(__CUDACC__)
#define VF_HD __host__ __device__ inline
#else
#define VF_HD inline
#endif
