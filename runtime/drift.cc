#include "runtime/drift.h"

#include "runtime/measure.h"

namespace mt {

void DriftWatch::Start(Backend& backend) {
  device_bytes_ = backend.UsedDeviceBytes();
  process_bytes_ = AnonymousBytes();
  StartCountingAllocations();
}

Drift DriftWatch::Stop(Backend& backend) {
  Drift drift;
  drift.allocations = StopCountingAllocations();
  drift.device_bytes = backend.UsedDeviceBytes() - device_bytes_;
  drift.process_bytes = AnonymousBytes() - process_bytes_;
  return drift;
}

}  // namespace mt
