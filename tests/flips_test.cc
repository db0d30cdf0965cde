// Flipped bits in the files of our own: found, or harmless. Half of the flips have their checksums made right, so that
// what reads the contents is tested. --flips N of each format.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/checkpoint/states.h"
#include "runtime/data/corpus.h"
#include "runtime/data/crc32c.h"
#include "runtime/train/train_state.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"
#include "tests/untrusted_plan.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

int64_t flips = 400;

// One bit, or two to eight at random places in one of four.
std::string Flipped(std::string bytes, std::mt19937_64& random) {
  const size_t count = random() % 4 == 0 ? 2 + random() % 7 : 1;
  for (size_t i = 0; i < count; ++i) bytes[random() % bytes.size()] ^= static_cast<char>(1 << random() % 8);
  return bytes;
}

void Write(const std::string& path, const std::string& bytes) {
  FILE* file = std::fopen(path.c_str(), "wb");
  CHECK(file != nullptr && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size()) << path;
  std::fclose(file);
}

uint64_t Get(absl::string_view bytes, size_t at, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) value |= uint64_t{static_cast<uint8_t>(bytes[at + i])} << (8 * i);
  return value;
}

void Put(uint64_t value, size_t at, size_t count, std::string& bytes) {
  for (size_t i = 0; i < count; ++i) bytes[at + i] = static_cast<char>(value >> (8 * i));
}

class FlipsTest : public ::testing::Test {
 protected:
  FlipsTest() : folder_(absl::StrCat(::testing::TempDir(), "/flips_test-", getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~FlipsTest() override { fs::remove_all(folder_); }

  const std::string folder_;
};

TEST_F(FlipsTest, Plan) {
  std::mt19937_64 random(1);
  int64_t refused = 0, used = 0, computed = 0;
  const std::vector<proto::PlanProto> plans = {TinyPlan({"width=16"}, 1, 4, 11),
                                               TinyPlan({"width=16", "dropout=0.1"}, 1, 4, 11)};
  for (int64_t flip = 0; flip < flips; ++flip) {
    const std::string good = SerializePlan(plans[random() % plans.size()]);
    if (flip % 2 == 0) {
      const std::string bad = Flipped(good, random);
      EXPECT_TRUE(bad == good || !ParsePlan(bad, "plan").ok());
      ++refused;
      continue;
    }
    constexpr size_t kHeader = 32;
    std::string bad = good.substr(0, kHeader) + Flipped(good.substr(kHeader), random);
    Put(Fnv1a(absl::string_view(bad).substr(kHeader)), 24, 8, bad);
    const absl::StatusOr<proto::PlanProto> plan = ParsePlan(bad, "plan");
    if (!plan.ok() || !VerifyPlan(*plan).ok()) {
      ++refused;
      continue;
    }
    ++used;
    computed += UsePlan(*plan) ? 1 : 0;
  }
  absl::PrintF("plan: %d flips, %d refused, %d verified, of which %d ran between guards\n", flips, refused, used,
               computed);
  EXPECT_GT(computed, 0);
}

TEST_F(FlipsTest, Checkpoint) {
  const proto::PlanProto plan = TinyPlan({"width=8"}, 1, 4, 7);
  ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(plan, 1));
  Checkpoint made;
  made.step = 4;
  made.model = "tiny";
  TrainState state;
  state.steps = 4;
  made.progress = ToJson(state);
  made.identity = {{"lr", 0.001}};
  made.environment = {{"blas", "x"}};
  SnapshotStates(*loaded->executor, &made.states);
  ASSERT_OK(WriteCheckpoint(folder_, made, 1));
  const std::string path = absl::StrCat(folder_, "/step-4");
  const std::vector<std::string> names = {"manifest.json", kWeightsFile, kOptimizerFile};
  std::vector<std::string> good;
  for (const std::string& name : names) good.push_back(ReadFile(absl::StrCat(path, "/", name)).value());

  std::mt19937_64 random(2);
  int64_t refused = 0, restored = 0;
  for (int64_t flip = 0; flip < flips; ++flip) {
    std::vector<std::string> bad = good;
    size_t at = random() % names.size();
    // Half of those in a safetensors file meet its header.
    if (at > 0 && random() % 2 == 0) {
      const size_t header = 8 + static_cast<size_t>(Get(good[at], 0, 8));
      bad[at] = Flipped(good[at].substr(0, header), random) + good[at].substr(header);
    } else {
      bad[at] = Flipped(good[at], random);
    }
    if (flip % 2 == 1) {
      std::string& manifest = bad[0];
      for (size_t i = 1; i < names.size(); ++i) {
        const size_t entry = manifest.find(absl::StrCat("\"name\": \"", names[i], "\""));
        const size_t crc = entry == std::string::npos ? entry : manifest.find("\"crc32c\": \"", entry);
        if (crc != std::string::npos && crc + 19 <= manifest.size()) {
          manifest.replace(crc + 11, 8, absl::StrFormat("%08x", Crc32c(bad[i])));
        }
      }
      const size_t end = manifest.rfind(",\n  \"crc32c\": \"");
      if (end != std::string::npos) {
        manifest.resize(end);
        absl::StrAppend(&manifest, ",\n  \"crc32c\": \"",
                        absl::StrFormat("%08x", Crc32c(absl::StrCat(manifest, "\n}"))), "\"\n}\n");
      }
    }
    for (size_t i = 0; i < names.size(); ++i) Write(absl::StrCat(path, "/", names[i]), bad[i]);
    const auto reader = CheckpointReader::Open(path);
    if (flip % 2 == 0) {
      EXPECT_TRUE(bad == good || !reader.ok()) << names[at];
    }
    if (!reader.ok()) {
      ++refused;
      continue;
    }
    TrainStateFromJson((*reader)->progress()).IgnoreError();
    restored += RestoreStates(*loaded->executor, **reader).ok() ? 1 : 0;
  }
  absl::PrintF("checkpoint: %d flips, %d refused, %d restored\n", flips, refused, restored);
  EXPECT_GT(restored, 0);
}

TEST_F(FlipsTest, Shard) {
  const std::string path = absl::StrCat(folder_, "/train-00000.bin");
  std::mt19937_64 random(3);
  int64_t refused = 0, read = 0;
  for (const int64_t vocab : {300, 70000}) {
    std::vector<int32_t> tokens(501);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(vocab));
    ASSERT_OK_AND_ASSIGN(const auto writer, ShardWriter::Create(path, {.vocab_size = vocab, .tokenizer_hash = 7}));
    ASSERT_OK(writer->Append(tokens));
    ASSERT_OK(writer->Finish());
    ASSERT_OK_AND_ASSIGN(const std::string good, ReadFile(path));
    for (int64_t flip = 0; flip < flips / 2; ++flip) {
      std::string bad = good;
      // Half of them meet the header.
      constexpr size_t kHeader = 64;
      if (random() % 2 == 0) {
        bad = Flipped(good.substr(0, kHeader), random) + good.substr(kHeader);
      } else {
        bad = Flipped(good, random);
      }
      if (flip % 2 == 1) {
        const size_t table = bad.size() - 4;
        const size_t bytes = static_cast<size_t>(
            std::min<uint64_t>(table - kHeader, Get(bad, 16, 8) % (1 << 20) * (Get(bad, 12, 4) % 16)));
        Put(Crc32c(absl::string_view(bad).substr(kHeader, bytes)), table, 4, bad);
        Put(Crc32c(absl::string_view(bad).substr(table)), 56, 4, bad);
        Put(Crc32c(absl::string_view(bad).substr(0, 60)), 60, 4, bad);
      }
      Write(path, bad);
      const auto shard = ShardReader::Open(path);
      absl::Status status = shard.status();
      std::vector<int32_t> back;
      if (shard.ok()) {
        back.resize(static_cast<size_t>((*shard)->header().num_tokens));
        status = (*shard)->Read(0, absl::MakeSpan(back));
      }
      if (flip % 2 == 0) {
        EXPECT_TRUE(!status.ok() || back == tokens);  // What is not read, such as padding, may differ.
      }
      (status.ok() ? read : refused) += 1;
      if (!status.ok()) continue;
      for (const int32_t token : back) ASSERT_TRUE(0 <= token && token < (*shard)->header().vocab_size) << token;
    }
  }
  absl::PrintF("shard: %d flips, %d refused, %d read\n", flips, refused, read);
  EXPECT_GT(read, 0);
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--flips") != 0 || i + 1 == argc || !absl::SimpleAtoi(argv[i + 1], &mt::flips)) {
      std::fprintf(stderr, "unknown argument %s; known: --flips N\n", argv[i]);
      return 2;
    }
    ++i;
  }
  return RUN_ALL_TESTS();
}
