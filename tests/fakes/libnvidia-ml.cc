// NVML as far as mt asks it: a device with 1 GiB free of 2, of which this machine's first process holds 700 MiB.
extern "C" {

struct Memory {
  unsigned long long total, free, used;
};
struct Process {
  unsigned pid;
  unsigned long long used_bytes;
  unsigned gpu_instance, compute_instance;
};

int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  static int any;
  *device = &any;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) {
  *memory = {2ull << 30, 1ull << 30, 1ull << 30};
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, Process* processes) {
  *count = 1;
  processes[0] = {1, 700ull << 20, 0, 0};
  return 0;
}

}  // extern "C"
