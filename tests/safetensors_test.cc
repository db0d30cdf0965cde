#include "runtime/data/safetensors.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "ir/base/file.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SafetensorsTest : public ::testing::Test {
 protected:
  SafetensorsTest() {
    folder_ = absl::StrCat(::testing::TempDir(), "/safetensors_test-", ::getpid());
    std::filesystem::create_directories(folder_);
    path_ = absl::StrCat(folder_, "/model.safetensors");
  }
  ~SafetensorsTest() override { std::filesystem::remove_all(folder_); }

  // A file with this header and `data_bytes` zeros.
  void WriteRaw(const std::string& header, int64_t data_bytes) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
    ASSERT_OK(WriteFile(path_, bytes + header + std::string(static_cast<size_t>(data_bytes), '\0')));
  }
  absl::Status OpenStatus() { return SafetensorsReader::Open(path_).status(); }
  int64_t FilesInFolder() {
    return std::distance(std::filesystem::directory_iterator(folder_), std::filesystem::directory_iterator());
  }

  std::string folder_;
  std::string path_;
};

std::vector<SafetensorsTensor> Tensors() {
  return {{.name = "b.bias", .type = SafetensorsType::kF32, .shape = {3}},
          {.name = "ids", .type = SafetensorsType::kI64, .shape = {2}},
          {.name = "a.weight", .type = SafetensorsType::kF32, .shape = {2, 3}},
          {.name = "half \"żółw\"", .type = SafetensorsType::kBF16, .shape = {1, 1}},
          {.name = "empty", .type = SafetensorsType::kF16, .shape = {0, 7}},
          {.name = "scalar", .type = SafetensorsType::kF64, .shape = {}},
          {.name = "bytes", .type = SafetensorsType::kU8, .shape = {5}}};
}

TEST_F(SafetensorsTest, RoundTripsInPartsAndAnyOrder) {
  std::vector<SafetensorsTensor> tensors = Tensors();
  ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(path_, tensors, {{"format", "mt"}, {"note", "ą\n\""}}));
  std::mt19937 random(1);
  std::map<std::string, std::string> contents;
  const std::map<std::string, int64_t> sizes = {{"b.bias", 12}, {"ids", 16},   {"a.weight", 24}, {"half \"żółw\"", 2},
                                                {"empty", 0},   {"scalar", 8}, {"bytes", 5}};
  for (const auto& [name, size] : sizes) {
    std::string& bytes = contents[name];
    for (int64_t i = 0; i < size; ++i) bytes.push_back(static_cast<char>(random()));
    ASSERT_OK(writer->Append(name, bytes.substr(0, bytes.size() / 2)));
    ASSERT_FALSE(std::filesystem::exists(path_));
    ASSERT_OK(writer->Append(name, bytes.substr(bytes.size() / 2)));
  }
  ASSERT_OK(writer->Finish());
  EXPECT_EQ(FilesInFolder(), 1);

  ASSERT_OK_AND_ASSIGN(const auto reader, SafetensorsReader::Open(path_));
  EXPECT_EQ(reader->metadata().at("format"), "mt");
  EXPECT_EQ(reader->metadata().at("note"), "ą\n\"");
  std::vector<std::string> order;
  for (const SafetensorsTensor& tensor : reader->tensors()) {
    order.push_back(tensor.name);
    EXPECT_EQ(reader->Bytes(tensor), contents[tensor.name]) << tensor.name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(reader->Bytes(tensor).data()) % static_cast<size_t>(SizeOf(tensor.type)), 0u);
  }
  EXPECT_THAT(order, ElementsAre("ids", "scalar", "a.weight", "b.bias", "half \"żółw\"", "empty", "bytes"));
  EXPECT_THAT(reader->Find("a.weight")->shape, ElementsAre(2, 3));
  EXPECT_TRUE(reader->Find("scalar")->shape.empty());
  EXPECT_EQ(SafetensorsTypeName(reader->Find("half \"żółw\"")->type), "BF16");
  EXPECT_EQ(reader->Find("none"), nullptr);
}

TEST_F(SafetensorsTest, WriterNamesWhatIsWrongAndLeavesNothing) {
  const auto create = [&](std::vector<SafetensorsTensor> tensors) {
    return SafetensorsWriter::Create(path_, std::move(tensors), {}).status();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(create({{.name = "a"}, {.name = "a"}}), StatusIs(invalid, HasSubstr("\"a\" is given twice")));
  EXPECT_THAT(create({{.name = "__metadata__"}}), StatusIs(invalid, HasSubstr("__metadata__")));
  EXPECT_THAT(create({{.name = "\xff"}}), StatusIs(invalid, HasSubstr("not UTF-8")));
  EXPECT_THAT(create({{.name = "a", .shape = {-1}}}), StatusIs(invalid, HasSubstr("overflows")));
  EXPECT_THAT(create({{.name = "a", .shape = {int64_t{1} << 40, int64_t{1} << 40}}}),
              StatusIs(invalid, HasSubstr("overflows")));
  {
    ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(path_, Tensors(), {}));
    EXPECT_THAT(writer->Append("nothing", ""), StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"nothing\"")));
    EXPECT_THAT(writer->Append("b.bias", std::string(13, 'x')), StatusIs(invalid, HasSubstr("got 13 bytes")));
    EXPECT_THAT(writer->Finish(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("its shape takes")));
  }
  EXPECT_EQ(FilesInFolder(), 0);
  EXPECT_THAT(SafetensorsWriter::Create(absl::StrCat(folder_, "/no/such/x"), {}, {}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("cannot create")));
}

TEST_F(SafetensorsTest, EmptyFileOfTensors) {
  ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(path_, {}, {}));
  ASSERT_OK(writer->Finish());
  ASSERT_OK_AND_ASSIGN(const auto reader, SafetensorsReader::Open(path_));
  EXPECT_TRUE(reader->tensors().empty());
}

TEST_F(SafetensorsTest, RefusesHostileHeaders) {
  struct Case {
    const char* header;
    int64_t data_bytes;
    const char* message;
  };
  const Case cases[] = {
      {"[]", 0, "does not start with {"},
      {"{", 0, "not JSON at byte"},
      {"{} x", 0, "not JSON at byte"},
      {R"({"a":5})", 0, "tensor \"a\" has a number"},
      {R"({"a":null})", 0, "has null"},
      {R"({"a":[1]})", 0, "has a list"},
      {R"({"a":{}})", 0, "lacks dtype"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "lacks data_offsets"},
      {R"({"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}})", 4, "has the dtype \"F3\""},
      {R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", 4, "has a number at \"dtype\""},
      {R"({"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}})", 4, "has a string"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "has a negative number"},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "with a fraction"},
      {R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4, "has a list"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4, "above 2^63"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "takes 8 bytes by its shape"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "no range"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "no range"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4, "more than two offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "a hole before it"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
       5, "overlaps"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       4, "\"a\" is given twice"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "gives \"dtype\" twice"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, "unknown key \"x\""},
      {R"({"__metadata__":{"a":1}})", 0, "has a number"},
      {R"({"__metadata__":{"a":{}}})", 0, "has an object"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 3, "cut off"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5, "the rest is unknown"},
      {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not JSON at byte"},
  };
  for (const Case& test : cases) {
    WriteRaw(test.header, test.data_bytes);
    EXPECT_THAT(OpenStatus(),
                StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr(path_), HasSubstr(test.message))))
        << test.header;
  }
  WriteRaw(absl::StrCat(R"({"a":{"dtype":"U8","shape":)", std::string(100000, '['), "1"), 0);
  EXPECT_FALSE(OpenStatus().ok());
}

TEST_F(SafetensorsTest, RefusesBadSizes) {
  EXPECT_THAT(OpenStatus(), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path_)));
  ASSERT_OK(WriteFile(path_, "short"));
  EXPECT_THAT(OpenStatus(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has 5 bytes")));
  ASSERT_OK(WriteFile(path_, std::string(8, '\xff') + "{}"));
  EXPECT_THAT(OpenStatus(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no safetensors file")));
  ASSERT_OK(WriteFile(path_, std::string("\x09\0\0\0\0\0\0\0{}", 10)));
  EXPECT_THAT(OpenStatus(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("cut off")));
  EXPECT_THAT(SafetensorsReader::Open(folder_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not a regular file")));
}

// Whatever one flipped bit or one cut does, opening and reading what was opened stays inside the file.
TEST_F(SafetensorsTest, SurvivesFlipsAndCuts) {
  ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(path_, Tensors(), {{"k", "v"}}));
  for (const SafetensorsTensor& tensor : Tensors()) {
    int64_t size = SizeOf(tensor.type);
    for (const int64_t dim : tensor.shape) size *= dim;
    ASSERT_OK(writer->Append(tensor.name, std::string(static_cast<size_t>(size), 'x')));
  }
  ASSERT_OK(writer->Finish());
  ASSERT_OK_AND_ASSIGN(const std::string good, ReadFile(path_));
  const std::string bad_path = absl::StrCat(folder_, "/bad");
  const auto write = [&](const std::string& bytes) {  // Without the sync of WriteFile.
    FILE* file = std::fopen(bad_path.c_str(), "wb");
    std::fwrite(bytes.data(), 1, bytes.size(), file);
    std::fclose(file);
  };
  for (size_t bit = 0; bit < good.size() * 8; bit += 11) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ 1 << (bit % 8));
    write(bad);
    const auto reader = SafetensorsReader::Open(bad_path);
    if (!reader.ok()) continue;
    int64_t sum = 0;
    for (const SafetensorsTensor& tensor : (*reader)->tensors()) {
      for (const char c : (*reader)->Bytes(tensor)) sum += c;
    }
    EXPECT_GT(sum, 0);
  }
  for (size_t size = 0; size < good.size(); size += 7) {
    write(good.substr(0, size));
    EXPECT_FALSE(SafetensorsReader::Open(bad_path).ok()) << size;
  }
}

}  // namespace
}  // namespace mt
