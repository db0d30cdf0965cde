// Pages, pictures and snapshots of plans say what the plan says, whatever its names are.
#include "codegen/report/report.h"

#include <cstring>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/report/chart.h"
#include "codegen/report/inspect.h"
#include "codegen/report/peak.h"
#include "codegen/report/tally.h"
#include "ir/base/json.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// The text between two marks, the first time.
std::string Between(const std::string& text, const std::string& begin, const std::string& end) {
  const size_t from = text.find(begin);
  if (from == std::string::npos) return "";
  return text.substr(from + begin.size(), text.find(end, from + begin.size()) - from - begin.size());
}

// The boxes of a picture, column by column and unit by unit: how often each place is covered.
struct Covered {
  int64_t boxes = 0;
  std::map<std::pair<int64_t, int64_t>, int> times;
};

Covered Cover(const std::string& plot) {
  static const std::regex kBox("M(\\d+) (\\d+)h(\\d+)v(\\d+)h-(\\d+)z");
  Covered covered;
  for (auto at = std::sregex_iterator(plot.begin(), plot.end(), kBox); at != std::sregex_iterator(); ++at) {
    ++covered.boxes;
    const int64_t x = std::stoll((*at)[1]), y = std::stoll((*at)[2]), w = std::stoll((*at)[3]),
                  h = std::stoll((*at)[4]);
    EXPECT_EQ(w, std::stoll((*at)[5]));
    for (int64_t i = x; i < x + w; ++i) {
      for (int64_t k = y; k < y + h; ++k) ++covered.times[{i, k}];
    }
  }
  return covered;
}

TEST(ReportTest, ThePictureCoversWhatIsLiveAndNothingTwice) {
  const proto::PlanProto plan = TinyPlan({}, 1, 4, 8);
  const proto::ProgramProto& program = LargestProgram(plan);
  const std::string svg = PlanSvg(plan);
  const std::string plot = Between(svg, "<svg class=\"mt-plot\"", "</svg>");
  const Covered covered = Cover(plot);
  int64_t boxes = 0, area = 0;
  const int64_t unit = ScaleOf(plan).bytes_per_unit;
  ASSERT_EQ(unit, plan.alignment());
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (buffer.program() != -1 && &plan.programs(buffer.program()) != &program) continue;
    ++boxes;
    const int64_t steps = buffer.program() == -1 ? program.instructions_size() : buffer.last() - buffer.first() + 1;
    area += steps * AlignedBytes(plan, buffer.size_bytes()) / unit;
  }
  EXPECT_EQ(covered.boxes, boxes);
  EXPECT_EQ(static_cast<int64_t>(covered.times.size()), area);
  for (const auto& [place, times] : covered.times) {
    ASSERT_EQ(times, 1) << "column " << place.first << ", unit " << place.second;
    ASSERT_LT(place.first, program.instructions_size());
    ASSERT_LT(place.second, ScaleOf(plan).units);
  }
  EXPECT_THAT(svg, HasSubstr(absl::StrCat(" at ", program.peak_instruction(), ": ")));
  for (const char* phase : {"forward", "backward", "optimizer"}) {
    EXPECT_THAT(svg, HasSubstr(absl::StrCat("class=\"mt-", phase, "\"")));
  }
}

TEST(ReportTest, LiveBytesOverTimeReachTheLowerBound) {
  const proto::PlanProto plan = TinyPlan();
  const proto::ProgramProto& program = LargestProgram(plan);
  for (const int columns : {program.instructions_size(), 17, 1}) {
    const std::vector<ClassBytes> live = LiveOverTime(plan, program, columns);
    ASSERT_EQ(static_cast<int>(live.size()), columns);
    int64_t most = 0;
    for (const ClassBytes& bytes : live) most = std::max(most, Sum(bytes));
    EXPECT_EQ(most, program.lower_bound_bytes());
  }
}

TEST(ReportTest, ThePageHoldsThePlan) {
  const proto::PlanProto plan = TinyPlan();
  const std::string html = PlanHtml(plan);
  for (const char* foreign : {"src=", "href=", "url(", "@import", "http://", "https://"}) {
    EXPECT_EQ(Count(html, foreign), absl::string_view(foreign) == "http://" ? 1u : 0u)
        << foreign;  // The SVG namespace.
  }
  const nlohmann::json data = nlohmann::json::parse(
      Between(html, "<script type=\"application/json\" id=\"plan\">", "</script>"), nullptr, false);
  ASSERT_TRUE(data.is_object());
  ASSERT_EQ(data["programs"].size(), static_cast<size_t>(plan.programs_size()));
  for (int i = 0; i < plan.programs_size(); ++i) {
    const nlohmann::json& program = data["programs"][static_cast<size_t>(i)];
    ASSERT_EQ(program["op"].size(), static_cast<size_t>(plan.programs(i).instructions_size()));
    size_t at = 0;
    for (const proto::BufferProto& buffer : plan.buffers()) {
      if (buffer.program() != -1 && buffer.program() != i) continue;
      EXPECT_EQ(program["offset"][at], buffer.offset());
      EXPECT_EQ(program["bytes"][at], buffer.size_bytes());
      EXPECT_EQ(program["state"][at], buffer.program() == -1 ? 1 : 0);
      EXPECT_EQ(data["strings"][program["label"][at].get<size_t>()], buffer.name());
      ++at;
    }
    EXPECT_EQ(program["offset"].size(), at);
    EXPECT_EQ(program["buffer"].size(), program["made"].size());
  }
  EXPECT_THAT(html, HasSubstr("Recomputed: nothing"));
}

TEST(ReportTest, NamesAreText) {
  proto::PlanProto plan = TinyPlan();
  const std::string evil = "</script><script>alert(1)</script><b onclick='x'>\"&\x01\xff";
  plan.set_model(evil);
  plan.set_passes(evil);
  plan.set_compiler(evil);
  for (proto::ProgramProto& program : *plan.mutable_programs()) {
    for (proto::TensorProto& tensor : *program.mutable_tensors()) tensor.set_name(evil);
    for (proto::InstructionProto& instruction : *program.mutable_instructions()) {
      instruction.set_name(evil);
      instruction.set_made_by(evil);
      instruction.set_recompute(true);
    }
  }
  for (proto::BufferProto& buffer : *plan.mutable_buffers()) buffer.set_name(evil);
  const std::string html = PlanHtml(plan);
  EXPECT_EQ(Count(html, "<script"), 2u);
  EXPECT_EQ(Count(html, "</script"), 2u);
  EXPECT_THAT(html, Not(HasSubstr("<b onclick")));
  EXPECT_THAT(html, Not(HasSubstr("\xff")));
  EXPECT_THAT(PlanSvg(plan), Not(HasSubstr("<script")));
  EXPECT_THAT(PlanSvg(plan), HasSubstr("&lt;script&gt;"));
  EXPECT_FALSE(nlohmann::json::parse(PlanSnapshotJson(plan), nullptr, false).is_discarded());
  EXPECT_EQ(EscapeXml("a<b>&\"'\x02\xc3\xa9\xc3"), "a&lt;b&gt;&amp;&quot;&#39;\xEF\xBF\xBD\xc3\xa9\xEF\xBF\xBD");
  EXPECT_EQ(EscapeXml("\xed\xa0\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD") << "a surrogate is no character";
}

// Reads the opcodes that the writer uses, as Python's Lib/pickle.py does.
nlohmann::ordered_json Unpickle(const std::string& bytes) {
  using Json = nlohmann::ordered_json;
  std::vector<Json> stack;
  std::vector<size_t> marks;
  std::map<uint32_t, Json> memo;
  size_t at = 2;
  const auto word = [&](size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i)
      value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes.at(at + i))) << 8 * i;
    at += size;
    return value;
  };
  while (true) {
    switch (static_cast<unsigned char>(bytes.at(at++))) {
      case '}':
        stack.push_back(Json::object());
        break;
      case ']':
        stack.push_back(Json::array());
        break;
      case '(':
        marks.push_back(stack.size());
        break;
      case 'K':
        stack.push_back(static_cast<int64_t>(word(1)));
        break;
      case 'J':
        stack.push_back(static_cast<int64_t>(static_cast<int32_t>(word(4))));
        break;
      case 0x8a:
        EXPECT_EQ(word(1), 8u);
        stack.push_back(static_cast<int64_t>(word(8)));
        break;
      case 'X': {
        const size_t size = word(4);
        stack.push_back(bytes.substr(at, size));
        at += size;
        break;
      }
      case 'r': {
        const uint32_t key = static_cast<uint32_t>(word(4));
        memo[key] = stack.back();
        break;
      }
      case 'j':
        stack.push_back(memo.at(static_cast<uint32_t>(word(4))));
        break;
      case 0x88:
      case 0x89:
        stack.push_back(static_cast<unsigned char>(bytes[at - 1]) == 0x88);
        break;
      case 'e': {
        const size_t mark = marks.back();
        marks.pop_back();
        for (size_t i = mark; i < stack.size(); ++i) stack[mark - 1].push_back(stack[i]);
        stack.resize(mark);
        break;
      }
      case 'u': {
        const size_t mark = marks.back();
        marks.pop_back();
        for (size_t i = mark; i + 1 < stack.size(); i += 2) stack[mark - 1][stack[i].get<std::string>()] = stack[i + 1];
        stack.resize(mark);
        break;
      }
      case '.':
        EXPECT_EQ(stack.size(), 1u);
        EXPECT_EQ(at, bytes.size());
        return stack.back();
      default:
        ADD_FAILURE() << "opcode at " << at - 1;
        return {};
    }
  }
}

TEST(ReportTest, TheSnapshotReplaysThePlan) {
  const proto::PlanProto plan = TinyPlan();
  const std::string pickle = PlanSnapshotPickle(plan);
  EXPECT_EQ(pickle.substr(0, 2), "\x80\x02");
  const nlohmann::ordered_json snapshot = Unpickle(pickle);
  EXPECT_EQ(snapshot, nlohmann::ordered_json::parse(PlanSnapshotJson(plan)));

  // Blocks lie one behind the other and fill the segment; what is live at the end are the states.
  ASSERT_EQ(snapshot["segments"].size(), 1u);
  const nlohmann::ordered_json& segment = snapshot["segments"][0];
  EXPECT_EQ(segment["total_size"], plan.arena_bytes());
  int64_t at = segment["address"], active = 0;
  std::map<int64_t, int64_t> live;  // Address and size.
  for (const nlohmann::ordered_json& block : segment["blocks"]) {
    EXPECT_EQ(block["address"], at);
    at += block["size"].get<int64_t>();
    if (block["state"] != "active_allocated") continue;
    active += block["size"].get<int64_t>();
    live[block["address"]] = block["size"];
  }
  EXPECT_EQ(at - segment["address"].get<int64_t>(), plan.arena_bytes());
  EXPECT_EQ(active, plan.persistent_bytes());

  // The events, from the states on: nothing overlaps, the most that is live is the lower bound, nothing is left.
  int64_t sum = active, most = active;
  for (const nlohmann::ordered_json& event : snapshot["device_traces"][0]) {
    const int64_t address = event["addr"], size = event["size"];
    if (event["action"] == "alloc") {
      const auto next = live.lower_bound(address);
      if (next != live.end()) {
        ASSERT_LE(address + size, next->first);
      }
      if (next != live.begin()) {
        ASSERT_LE(std::prev(next)->first + std::prev(next)->second, address);
      }
      live[address] = size;
      sum += size;
      most = std::max(most, sum);
      EXPECT_FALSE(event["frames"].empty());
    } else if (event["action"] == "free_completed") {
      ASSERT_EQ(live[address], size);
      live.erase(address);
      sum -= size;
    }
  }
  EXPECT_EQ(most, LargestProgram(plan).lower_bound_bytes());
  EXPECT_EQ(sum, active);
}

TEST(TallyTest, WhatIsRecomputedIsListedByKind) {
  proto::PlanProto plan = TinyPlan({"layers=3"});
  proto::ProgramProto& train = *plan.mutable_programs(0);
  int64_t flops = 0, bytes = 0;
  int count = 0;
  for (proto::InstructionProto& instruction : *train.mutable_instructions()) {
    if (instruction.op() != "gelu" || instruction.phase() != "forward") continue;
    instruction.set_recompute(true);
    flops += instruction.flops();
    bytes += instruction.bytes();
    ++count;
  }
  const Recomputation again = RecomputationOf(plan, train);
  EXPECT_EQ(again.count, count);
  EXPECT_EQ(count, 3);
  EXPECT_EQ(again.flops, flops);
  EXPECT_EQ(again.bytes, bytes);
  ASSERT_FALSE(again.ops.empty());
  EXPECT_EQ(again.ops[0].op, "gelu");
  EXPECT_EQ(again.ops[0].name, "h*.mlp.activation");
  EXPECT_EQ(again.ops[0].count, 3);
  EXPECT_GT(again.seconds, 0);
  EXPECT_LT(again.seconds, again.program_seconds);
  EXPECT_THAT(PlanTable(plan), HasSubstr("gelu h*.mlp.activation"));
  EXPECT_THAT(PlanHtml(plan), HasSubstr("h*.mlp.activation"));
}

TEST(TallyTest, PaddingAndDTypes) {
  proto::PlanProto plan = TinyPlan();
  EXPECT_EQ(PaddingOf(plan).state_bytes, 0);
  proto::StateProto& state = *plan.mutable_states(0)->mutable_state();
  ASSERT_EQ(state.logical_dims_size(), 2);
  state.set_logical_dims(0, state.logical_dims(0) - 3);
  EXPECT_EQ(PaddingOf(plan).state_bytes, 3 * state.type().dims(1) * 4);
  const proto::ProgramProto& program = LargestProgram(plan);
  int64_t alignment = 0;
  for (const int b : LiveBuffers(plan, program, program.peak_instruction())) {
    alignment += AlignedBytes(plan, plan.buffers(b).size_bytes()) - plan.buffers(b).size_bytes();
  }
  EXPECT_EQ(PaddingOf(plan).alignment_bytes, alignment);

  const ClassDTypes dtypes = DTypesOf(plan, program);
  ASSERT_EQ(dtypes[0].size(), 1u);
  EXPECT_EQ(dtypes[0][0].first, "f32");
  int64_t parameters = 0;
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (buffer.memory_class() == proto::PARAMETERS) parameters += buffer.size_bytes();
  }
  EXPECT_EQ(dtypes[0][0].second, parameters);
  EXPECT_EQ(DTypesText({{"bf16", 870}, {"f32", 129}, {"i32", 1}}), "bf16 87 %, f32 13 %, i32 < 1 %");
  EXPECT_EQ(DTypesText({{"f32", 5}}), "f32");
}

TEST(InspectTest, WritesReports) {
  const ProcessFolder folder("report_test");
  const std::string spec = "mtc inspect tiny_char --set layers=1,width=32,heads=2 --batch 2 --seq 16 ";
  const Outcome outcome = folder.Run(spec + "--html a.html --svg a.svg --memory-viz a.pickle");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("arena"));
  EXPECT_THAT(folder.Read("a.html"), HasSubstr("<!doctype html>"));
  EXPECT_THAT(folder.Read("a.svg"), HasSubstr("xmlns=\"http://www.w3.org/2000/svg\""));
  EXPECT_EQ(folder.Read("a.pickle").substr(0, 2), "\x80\x02");
  EXPECT_EQ(folder.Run(spec + "--memory-viz a.json").code, 0);
  EXPECT_TRUE(folder.ReadJson("a.json").is_object());
  folder.ExpectError(spec + "--html nowhere/a.html", 7, HasSubstr("nowhere/a.html"));
  folder.ExpectError("mtc compile tiny_char --html a.html", 2, HasSubstr("--html"));
}

}  // namespace
}  // namespace mt
