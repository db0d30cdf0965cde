// A plan file whose checksum is taken as right. What the verifier accepts, as it is or with its sums made right, is
// used as UsePlan does.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "google/protobuf/arena.h"
#include "google/protobuf/stubs/logging.h"
#include "tests/fuzz/fuzz.h"
#include "tests/untrusted_plan.h"

namespace mt {
namespace {

constexpr size_t kHeaderBytes = 32;

// A plan has thousands of messages: in an arena they are not allocated one by one.
proto::PlanProto& NewPlan(google::protobuf::Arena& arena) {
  return *google::protobuf::Arena::CreateMessage<proto::PlanProto>(&arena);
}

// The sums over buffers, which the verifier computes again.
void RepairSums(proto::PlanProto& plan) {
  int64_t arena = plan.persistent_bytes(), lower_bound = arena;
  const auto proof = [](int64_t peak, int64_t bound, const std::string& old) -> std::string {
    if (peak == bound) return "lower_bound";
    return old == "lower_bound" ? "gap" : old;
  };
  for (int p = 0; p < plan.programs_size(); ++p) {
    proto::ProgramProto& program = *plan.mutable_programs(p);
    const int n = std::max(program.instructions_size(), 1);
    std::vector<uint64_t> change(static_cast<size_t>(n) + 1, 0);
    int64_t top = plan.persistent_bytes();
    for (const proto::BufferProto& buffer : plan.buffers()) {
      if (buffer.program() != p || buffer.first() < 0 || buffer.last() < buffer.first() || buffer.last() >= n) continue;
      if (buffer.size_bytes() < 0 || buffer.size_bytes() > kMaxArenaBytes || buffer.offset() < 0 ||
          buffer.offset() > kMaxArenaBytes) {
        return;
      }
      const int64_t bytes = AlignedBytes(plan, buffer.size_bytes());
      top = std::max(top, buffer.offset() + bytes);
      change[static_cast<size_t>(buffer.first())] += static_cast<uint64_t>(bytes);
      change[static_cast<size_t>(buffer.last()) + 1] -= static_cast<uint64_t>(bytes);
    }
    int64_t live = plan.persistent_bytes(), most = live;
    int at = 0;
    for (int i = 0; i < n; ++i) {
      live = static_cast<int64_t>(static_cast<uint64_t>(live) + change[static_cast<size_t>(i)]);
      if (live > most) most = live, at = i;
    }
    program.set_peak_bytes(top);
    program.set_lower_bound_bytes(most);
    program.set_peak_instruction(at);
    program.set_proof(proof(top, most, program.proof()));
    arena = std::max(arena, top);
    lower_bound = std::max(lower_bound, most);
  }
  plan.set_arena_bytes(arena);
  plan.set_lower_bound_bytes(lower_bound);
  plan.set_proof(proof(arena, lower_bound, plan.proof()));
}

}  // namespace
}  // namespace mt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const google::protobuf::LogSilencer quiet;
  const absl::string_view bytes = mt::Bytes(data, size);
  (void)mt::ParsePlan(bytes, "plan");
  google::protobuf::Arena arena;
  mt::proto::PlanProto& plan = mt::NewPlan(arena);
  if (size < mt::kHeaderBytes ||
      !plan.ParseFromArray(data + mt::kHeaderBytes, static_cast<int>(size - mt::kHeaderBytes))) {
    return 0;
  }
  if (mt::VerifyPlan(plan).ok()) {
    mt::UsePlan(plan);
    return 0;
  }
  if (plan.alignment() < 1 || plan.alignment() > 1 << 20) return 0;
  mt::RepairSums(plan);
  if (mt::VerifyPlan(plan).ok()) mt::UsePlan(plan);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  if (size < mt::kHeaderBytes || max_size < mt::kHeaderBytes) {
    const std::string header("mtplan\r\n\1", 9);
    size = std::min(max_size, mt::kHeaderBytes);
    std::fill_n(data, size, 0);
    std::copy_n(header.begin(), std::min(size, header.size()), data);
    return size;
  }
  google::protobuf::Arena arena;
  mt::proto::PlanProto& plan = mt::NewPlan(arena);
  return mt::kHeaderBytes +
         mt::MutateBinary(data + mt::kHeaderBytes, size - mt::kHeaderBytes, max_size - mt::kHeaderBytes, seed, plan);
}
