#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/stubs/logging.h"
#include "google/protobuf/text_format.h"
#include "ir/base/check.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace mt {
namespace {

namespace pb = ::google::protobuf;
using Field = pb::FieldDescriptor;

size_t Below(size_t count, std::mt19937& random) { return count == 0 ? 0 : random() % count; }

// All messages in `message`, itself first, and the strings in them. Entries of maps are among them.
void Collect(pb::Message& message, std::vector<pb::Message*>& messages, std::vector<std::string>& strings) {
  if (messages.size() > 20000) return;
  messages.push_back(&message);
  const pb::Reflection& reflection = *message.GetReflection();
  std::vector<const Field*> fields;
  reflection.ListFields(message, &fields);
  for (const Field* field : fields) {
    const int count = field->is_repeated() ? reflection.FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      if (field->cpp_type() == Field::CPPTYPE_MESSAGE) {
        Collect(field->is_repeated() ? *reflection.MutableRepeatedMessage(&message, field, i)
                                     : *reflection.MutableMessage(&message, field),
                messages, strings);
      } else if (field->cpp_type() == Field::CPPTYPE_STRING) {
        strings.push_back(field->is_repeated() ? reflection.GetRepeatedString(message, field, i)
                                               : reflection.GetString(message, field));
      }
    }
  }
}

int64_t MutateInt(int64_t old, std::mt19937& random) {
  static constexpr int64_t kKnown[] = {0,
                                       1,
                                       -1,
                                       2,
                                       3,
                                       8,
                                       64,
                                       255,
                                       256,
                                       65535,
                                       65536,
                                       int64_t{1} << 20,
                                       std::numeric_limits<int32_t>::max(),
                                       std::numeric_limits<int32_t>::min(),
                                       int64_t{1} << 32,
                                       int64_t{1} << 44,
                                       int64_t{1} << 50,
                                       int64_t{1} << 62,
                                       std::numeric_limits<int64_t>::max(),
                                       std::numeric_limits<int64_t>::min()};
  const uint64_t value = static_cast<uint64_t>(old);
  switch (random() % 8) {
    case 0:
    case 1:
      return static_cast<int64_t>(value + 1);
    case 2:
      return static_cast<int64_t>(value - 1);
    case 3:
      return static_cast<int64_t>(value * 2);
    case 4:
      return old / 2;
    case 5:
      return static_cast<int64_t>(value ^ uint64_t{1} << random() % 64);
    case 6:
      return static_cast<int64_t>(random() % 64);
    default:
      return kKnown[random() % std::size(kKnown)];
  }
}

double MutateDouble(double old, std::mt19937& random) {
  static constexpr double kKnown[] = {0,
                                      -0.0,
                                      1,
                                      -1,
                                      0.5,
                                      1e-30,
                                      1e30,
                                      1e308,
                                      1e-5,
                                      5e-324,
                                      -1e300,
                                      std::numeric_limits<double>::infinity(),
                                      std::numeric_limits<double>::quiet_NaN()};
  switch (random() % 3) {
    case 0:
      return old * 2;
    case 1:
      return old + 1;
    default:
      return kKnown[random() % std::size(kKnown)];
  }
}

std::string MutateString(std::string old, const std::vector<std::string>& strings, std::mt19937& random) {
  if (!strings.empty() && random() % 3 != 0) return strings[random() % strings.size()];
  const size_t room = old.size() + 16;
  const size_t size = old.size();
  old.resize(room);
  old.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(old.data()), size, room));
  return old;
}

void MutateScalar(pb::Message& message, const Field* field, const std::vector<std::string>& strings, int at,
                  std::mt19937& random) {
  const pb::Reflection& r = *message.GetReflection();
  const bool repeated = field->is_repeated();
  switch (field->cpp_type()) {
    case Field::CPPTYPE_INT32: {
      const int64_t old = repeated ? r.GetRepeatedInt32(message, field, at) : r.GetInt32(message, field);
      const int32_t value = static_cast<int32_t>(static_cast<uint64_t>(MutateInt(old, random)));
      return repeated ? r.SetRepeatedInt32(&message, field, at, value) : r.SetInt32(&message, field, value);
    }
    case Field::CPPTYPE_INT64: {
      const int64_t old = repeated ? r.GetRepeatedInt64(message, field, at) : r.GetInt64(message, field);
      const int64_t value = MutateInt(old, random);
      return repeated ? r.SetRepeatedInt64(&message, field, at, value) : r.SetInt64(&message, field, value);
    }
    case Field::CPPTYPE_UINT32: {
      const int64_t old = repeated ? r.GetRepeatedUInt32(message, field, at) : r.GetUInt32(message, field);
      const uint32_t value = static_cast<uint32_t>(MutateInt(old, random));
      return repeated ? r.SetRepeatedUInt32(&message, field, at, value) : r.SetUInt32(&message, field, value);
    }
    case Field::CPPTYPE_UINT64: {
      const uint64_t old = repeated ? r.GetRepeatedUInt64(message, field, at) : r.GetUInt64(message, field);
      const uint64_t value = static_cast<uint64_t>(MutateInt(static_cast<int64_t>(old), random));
      return repeated ? r.SetRepeatedUInt64(&message, field, at, value) : r.SetUInt64(&message, field, value);
    }
    case Field::CPPTYPE_FLOAT: {
      const double old = repeated ? r.GetRepeatedFloat(message, field, at) : r.GetFloat(message, field);
      const float value = static_cast<float>(MutateDouble(old, random));
      return repeated ? r.SetRepeatedFloat(&message, field, at, value) : r.SetFloat(&message, field, value);
    }
    case Field::CPPTYPE_DOUBLE: {
      const double old = repeated ? r.GetRepeatedDouble(message, field, at) : r.GetDouble(message, field);
      const double value = MutateDouble(old, random);
      return repeated ? r.SetRepeatedDouble(&message, field, at, value) : r.SetDouble(&message, field, value);
    }
    case Field::CPPTYPE_BOOL: {
      const bool old = repeated ? r.GetRepeatedBool(message, field, at) : r.GetBool(message, field);
      return repeated ? r.SetRepeatedBool(&message, field, at, !old) : r.SetBool(&message, field, !old);
    }
    case Field::CPPTYPE_ENUM: {
      const pb::EnumDescriptor& values = *field->enum_type();
      const int value =
          values.value(static_cast<int>(random() % static_cast<unsigned>(values.value_count())))->number();
      return repeated ? r.SetRepeatedEnumValue(&message, field, at, value) : r.SetEnumValue(&message, field, value);
    }
    case Field::CPPTYPE_STRING: {
      std::string old = repeated ? r.GetRepeatedString(message, field, at) : r.GetString(message, field);
      std::string value = MutateString(std::move(old), strings, random);
      // proto3 drops strings that are no UTF-8 where it parses.
      if (field->type() == Field::TYPE_STRING) {
        for (char& c : value) c = static_cast<char>(c & 0x7f);
      }
      return repeated ? r.SetRepeatedString(&message, field, at, value) : r.SetString(&message, field, value);
    }
    case Field::CPPTYPE_MESSAGE:
      return;
  }
}

void AddElement(pb::Message& message, const Field* field, std::mt19937& random) {
  const pb::Reflection& r = *message.GetReflection();
  const int size = r.FieldSize(message, field);
  const int from = static_cast<int>(Below(static_cast<size_t>(size), random));
  switch (field->cpp_type()) {
    case Field::CPPTYPE_INT32:
      return r.AddInt32(&message, field, size > 0 ? r.GetRepeatedInt32(message, field, from) : 0);
    case Field::CPPTYPE_INT64:
      return r.AddInt64(&message, field, size > 0 ? r.GetRepeatedInt64(message, field, from) : 0);
    case Field::CPPTYPE_STRING:
      return r.AddString(&message, field, size > 0 ? r.GetRepeatedString(message, field, from) : "");
    case Field::CPPTYPE_MESSAGE: {
      if (field->is_map()) {
        r.AddMessage(&message, field);
        return;
      }
      pb::Message* added = r.AddMessage(&message, field);
      if (size > 0) added->CopyFrom(r.GetRepeatedMessage(message, field, from));
      return;
    }
    default:
      return;
  }
}

}  // namespace

std::string MemoryFile(absl::string_view contents, absl::string_view suffix) {
  static const int fd = [] {
    // A number of its own: what the processes of one run share is the name, which means each one's own file.
    constexpr int kNumber = 500;
    const int made = ::memfd_create("fuzz", 0);
    CHECK(made >= 0 && ::dup2(made, kNumber) == kNumber) << std::strerror(errno);
    return kNumber;
  }();
  CHECK_EQ(::ftruncate(fd, 0), 0);
  CHECK_EQ(::pwrite(fd, contents.data(), contents.size(), 0), static_cast<ssize_t>(contents.size()));
  std::string path = absl::StrCat("/proc/self/fd/", fd);
  if (suffix.empty()) return path;
  const char* folder = std::getenv("TMPDIR");
  const std::string link = absl::StrCat(folder == nullptr ? "/tmp" : folder, "/mt_fuzz", suffix);
  CHECK(::symlink(path.c_str(), link.c_str()) == 0 || errno == EEXIST) << link << ": " << std::strerror(errno);
  return link;
}

void MutateMessage(pb::Message& message, std::mt19937& random) {
  std::vector<pb::Message*> messages;
  std::vector<std::string> strings;
  Collect(message, messages, strings);
  pb::Message& target = *messages[Below(messages.size(), random)];
  const pb::Reflection& r = *target.GetReflection();
  const pb::Descriptor& descriptor = *target.GetDescriptor();
  if (descriptor.field_count() == 0) return;
  const Field* field = descriptor.field(static_cast<int>(Below(static_cast<size_t>(descriptor.field_count()), random)));
  if (!field->is_repeated()) {
    if (field->cpp_type() != Field::CPPTYPE_MESSAGE) {
      if (random() % 16 == 0 && !descriptor.options().map_entry()) return r.ClearField(&target, field);
      return MutateScalar(target, field, strings, 0, random);
    }
    // Another message of the type takes its place, or none.
    if (random() % 8 == 0) return r.ClearField(&target, field);
    for (int tries = 0; tries < 8; ++tries) {
      const pb::Message& other = *messages[Below(messages.size(), random)];
      if (other.GetDescriptor() == field->message_type()) {
        const std::unique_ptr<pb::Message> copy(other.New());
        copy->CopyFrom(other);
        r.MutableMessage(&target, field)->CopyFrom(*copy);
        return;
      }
    }
    r.MutableMessage(&target, field);
    return;
  }
  const int size = r.FieldSize(target, field);
  const int at = static_cast<int>(Below(static_cast<size_t>(size), random));
  switch (random() % 5) {
    case 0:
      return AddElement(target, field, random);
    case 1:
      if (size == 0) return;
      r.SwapElements(&target, field, at, size - 1);
      return r.RemoveLast(&target, field);
    case 2:
      if (size == 0) return;
      return r.SwapElements(&target, field, at, static_cast<int>(Below(static_cast<size_t>(size), random)));
    default:
      if (size > 0) MutateScalar(target, field, strings, at, random);
  }
}

namespace {

// Whether the bytes are to be mutated; else `message` holds what they say, with some changes.
bool AsBytes(bool parsed, unsigned int seed, pb::Message& message) {
  std::mt19937 random(seed);
  if (!parsed || random() % 4 == 0) return true;
  for (unsigned changes = 1 + random() % 4; changes > 0; --changes) MutateMessage(message, random);
  return false;
}

size_t Replace(uint8_t* data, size_t size, size_t max_size, const std::string& bytes) {
  if (bytes.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(bytes.begin(), bytes.end(), data);
  return bytes.size();
}

// Errors are nobody's business here.
class Quiet : public pb::io::ErrorCollector {
  void AddError(int, pb::io::ColumnNumber, const std::string&) override {}
};

}  // namespace

size_t MutateText(uint8_t* data, size_t size, size_t max_size, unsigned int seed, pb::Message& message) {
  Quiet quiet;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&quiet);
  parser.SetRecursionLimit(32);
  const bool parsed = parser.ParseFromString(std::string(Bytes(data, size)), &message);
  if (AsBytes(parsed, seed, message)) return LLVMFuzzerMutate(data, size, max_size);
  std::string text;
  pb::TextFormat::PrintToString(message, &text);
  return Replace(data, size, max_size, text);
}

size_t MutateBinary(uint8_t* data, size_t size, size_t max_size, unsigned int seed, pb::Message& message) {
  const pb::LogSilencer quiet;
  const bool parsed = message.ParsePartialFromArray(data, static_cast<int>(size));
  if (AsBytes(parsed, seed, message)) return LLVMFuzzerMutate(data, size, max_size);
  return Replace(data, size, max_size, message.SerializePartialAsString());
}

}  // namespace mt
