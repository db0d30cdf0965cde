// The sum of the rows' losses, in f64, and the number of rows with a label. One block.
// Constants before this text: kRows.
__device__ __forceinline__ double BlockSum(double x, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
#pragma unroll
  for (int half = 512; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

extern "C" __global__ void __launch_bounds__(1024) mt_loss_sum(const float* losses, float* loss_sum) {
  __shared__ double shared[1024];
  double sum = 0;
  for (u64 i = threadIdx.x; i < kRows; i += 1024) sum += losses[i];
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) *loss_sum = (float)sum;
}

extern "C" __global__ void __launch_bounds__(1024) mt_count_labels(const int* labels, float* count) {
  __shared__ double shared[1024];
  double sum = 0;
  for (u64 i = threadIdx.x; i < kRows; i += 1024) sum += labels[i] >= 0 ? 1.0 : 0.0;
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) *count = (float)sum;
}
