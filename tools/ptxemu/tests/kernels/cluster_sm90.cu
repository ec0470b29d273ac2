// Ranks in clusters that a kernel names itself, and that its launch names.
#include <cuda_runtime.h>

__device__ unsigned rank_of() {
    unsigned r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__global__ void __cluster_dims__(4, 1, 1) own(unsigned* out) { out[blockIdx.x] = rank_of(); }
__global__ void any(unsigned* out) { out[blockIdx.x] = rank_of(); }

extern "C" int launch_own(unsigned* out, long ctas) {
    own<<<ctas, 1>>>(out);
    return cudaGetLastError();
}
extern "C" int launch_any(unsigned* out, long ctas, long cluster) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ctas), config.blockDim = dim3(1);
    config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, any, out);
}
