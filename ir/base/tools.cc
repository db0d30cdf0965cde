#include "ir/base/tools.h"

namespace mt {

absl::Span<const ToolDef* const> AllTools() {
  static constexpr const ToolDef* kTools[] = {&kMtc, &kMtrun, &kMtcorpus, &kMtlab};
  return kTools;
}

}  // namespace mt
