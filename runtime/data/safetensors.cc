#include "runtime/data/safetensors.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"

namespace mt {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr char kMetadataKey[] = "__metadata__";
constexpr size_t kMaxRank = 64;

struct TypeRow {
  SafetensorsType type;
  const char* name;
  int64_t size_bytes;
};
constexpr TypeRow kTypes[] = {
    {SafetensorsType::kU8, "U8", 1},   {SafetensorsType::kF16, "F16", 2}, {SafetensorsType::kBF16, "BF16", 2},
    {SafetensorsType::kI32, "I32", 4}, {SafetensorsType::kF32, "F32", 4}, {SafetensorsType::kI64, "I64", 8},
    {SafetensorsType::kF64, "F64", 8},
};

const TypeRow& Row(SafetensorsType type) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes), [type](const TypeRow& row) { return row.type == type; });
}

// False where a dimension is negative or the product overflows.
bool SizeBytes(SafetensorsType type, const std::vector<int64_t>& shape, int64_t* size_bytes) {
  int64_t size = SizeOf(type);
  for (const int64_t dim : shape) {
    if (dim < 0 || __builtin_mul_overflow(size, dim, &size)) return false;
  }
  *size_bytes = size;
  return true;
}

std::string Printable(absl::string_view text) {
  return nlohmann::json(std::string(text.substr(0, 200))).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

// The header as events: a tree would keep only the last of two equal keys, and take several times the memory.
class HeaderParser : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<SafetensorsTensor> tensors;
  std::map<std::string, std::string> metadata;
  std::string fault;

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_float(double, const std::string&) override { return Unexpected("a number with a fraction"); }
  bool binary(nlohmann::json::binary_t&) override { return Unexpected("binary data"); }
  bool number_integer(int64_t) override { return Unexpected("a negative number"); }

  bool number_unsigned(uint64_t value) override {
    if (state_ != State::kShape && state_ != State::kOffsets) return Unexpected("a number");
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return Unexpected("a number above 2^63");
    if (state_ == State::kShape) {
      if (tensor_.shape.size() == kMaxRank) return Fail(absl::StrCat("has more than ", kMaxRank, " dimensions"));
      tensor_.shape.push_back(static_cast<int64_t>(value));
    } else {
      if (offsets_.size() == 2) return Fail("has more than two offsets");
      offsets_.push_back(static_cast<int64_t>(value));
    }
    return true;
  }

  bool string(std::string& value) override {
    if (state_ == State::kMetadata) {
      metadata[key_] = value;
      return true;
    }
    if (state_ != State::kTensor || key_ != "dtype") return Unexpected("a string");
    for (const TypeRow& row : kTypes) {
      if (value == row.name) {
        tensor_.type = row.type;
        return true;
      }
    }
    return Fail(
        absl::StrCat("has the dtype ", Printable(value), "; F64, F32, F16, BF16, I64, I32 and U8 are supported"));
  }

  bool start_object(size_t) override {
    if (state_ == State::kStart) {
      state_ = State::kTop;
    } else if (state_ == State::kTop && name_ == kMetadataKey) {
      state_ = State::kMetadata;
    } else if (state_ == State::kTop) {
      state_ = State::kTensor;
      tensor_ = {};
      tensor_.name = name_;
      offsets_.clear();
    } else {
      return Unexpected("an object");
    }
    keys_.clear();
    return true;
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      for (const char* key : {"dtype", "shape", "data_offsets"}) {
        if (!keys_.contains(key)) return Fail(absl::StrCat("lacks ", key));
      }
      if (offsets_.size() != 2 || offsets_[0] > offsets_[1]) return Fail("has data_offsets that are no range");
      int64_t size = 0;
      if (!SizeBytes(tensor_.type, tensor_.shape, &size)) return Fail("has a shape whose size overflows");
      tensor_.offset = offsets_[0];
      tensor_.size_bytes = offsets_[1] - offsets_[0];
      if (size != tensor_.size_bytes) {
        return Fail(absl::StrCat("takes ", size, " bytes by its shape, its data_offsets hold ", tensor_.size_bytes));
      }
      tensors.push_back(std::move(tensor_));
    }
    state_ = state_ == State::kTop ? State::kEnd : State::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (state_ != State::kTensor || (key_ != "shape" && key_ != "data_offsets")) return Unexpected("a list");
    state_ = key_ == "shape" ? State::kShape : State::kOffsets;
    return true;
  }
  bool end_array() override {
    state_ = State::kTensor;
    return true;
  }

  bool key(std::string& value) override {
    if (state_ == State::kTop) {
      name_ = value;
      key_.clear();
      if (!names_.insert(value).second) return Fail("is given twice");
      return true;
    }
    key_ = value;
    if (!keys_.insert(value).second) return Fail(absl::StrCat("gives ", Printable(value), " twice"));
    if (state_ == State::kTensor && value != "dtype" && value != "shape" && value != "data_offsets") {
      return Fail(absl::StrCat("has the unknown key ", Printable(value)));
    }
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    fault = absl::StrCat("the header is not JSON at byte ", 8 + position);
    return false;
  }

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };

  bool Fail(absl::string_view fact) {
    fault = absl::StrCat(name_ == kMetadataKey ? "" : "tensor ", Printable(name_), " ", fact);
    return false;
  }
  bool Unexpected(const char* what) {
    if (name_.empty() && state_ != State::kTensor) {
      fault = absl::StrCat("the header has ", what, " where an object belongs");
      return false;
    }
    return Fail(absl::StrCat("has ", what, key_.empty() ? "" : absl::StrCat(" at ", Printable(key_)),
                             ", which does not belong there"));
  }

  State state_ = State::kStart;
  std::string name_;
  std::string key_;
  SafetensorsTensor tensor_;
  std::vector<int64_t> offsets_;
  absl::flat_hash_set<std::string> names_;
  absl::flat_hash_set<std::string> keys_;  // Of the open inner object.
};

}  // namespace

int64_t SizeOf(SafetensorsType type) { return Row(type).size_bytes; }
absl::string_view SafetensorsTypeName(SafetensorsType type) { return Row(type).name; }

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, std::vector<SafetensorsTensor> tensors, const std::map<std::string, std::string>& metadata,
    FileSystem& files) {
  const auto fault = [&](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", absl::StrCat(parts...)));
  };
  const auto is_utf8 = [](absl::string_view text) {
    return ValidUtf8Prefix(text) == static_cast<int64_t>(text.size());
  };
  std::sort(tensors.begin(), tensors.end(), [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
    return a.type != b.type ? a.type > b.type : a.name < b.name;
  });
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  nlohmann::ordered_json metadata_json = nlohmann::ordered_json::object();
  for (const auto& [key, value] : metadata) {
    if (!is_utf8(key) || !is_utf8(value)) return fault("metadata ", Printable(key), " is not UTF-8");
    metadata_json[key] = value;
  }
  // Written by hand: an ordered_json of all tensors would look every name up in a list.
  std::string header = "{";
  if (!metadata.empty()) absl::StrAppend(&header, "\"", kMetadataKey, "\":", metadata_json.dump());
  int64_t offset = 0;
  for (SafetensorsTensor& tensor : tensors) {
    const std::string name = Printable(tensor.name);
    if (!is_utf8(tensor.name)) return fault("the name of tensor ", name, " is not UTF-8");
    if (tensor.name == kMetadataKey) return fault("a tensor may not be called ", kMetadataKey);
    tensor.offset = offset;
    if (tensor.shape.size() > kMaxRank || !SizeBytes(tensor.type, tensor.shape, &tensor.size_bytes) ||
        __builtin_add_overflow(offset, tensor.size_bytes, &offset)) {
      return fault("tensor ", name, " has a shape that is negative or overflows");
    }
    if (header.size() > 1) header += ",";
    absl::StrAppend(&header, nlohmann::json(tensor.name).dump(), ":{\"dtype\":\"", SafetensorsTypeName(tensor.type),
                    "\",\"shape\":", nlohmann::json(tensor.shape).dump(), ",\"data_offsets\":[", tensor.offset, ",",
                    offset, "]}");
    const std::string key = tensor.name;
    writer->names_.push_back(key);
    if (!writer->entries_.insert({key, {std::move(tensor)}}).second) return fault("tensor ", name, " is given twice");
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (static_cast<int64_t>(header.size()) > kMaxHeaderBytes) {
    return fault("the header has ", header.size(), " bytes, the format's limit is ", kMaxHeaderBytes);
  }
  std::string start;
  for (int i = 0; i < 8; ++i) start.push_back(static_cast<char>(header.size() >> (8 * i)));
  ASSIGN_OR_RETURN(writer->file_, AtomicFile::Create(path, files));
  RETURN_IF_ERROR(writer->file_->Append(start + header));
  writer->data_start_ = static_cast<int64_t>(start.size() + header.size());
  return writer;
}

absl::Status SafetensorsWriter::Append(absl::string_view name, absl::string_view bytes) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    return absl::NotFoundError(absl::StrCat(file_->path(), ": tensor ", Printable(name), " was not declared"));
  }
  Entry& entry = found->second;
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size > entry.tensor.size_bytes - entry.written_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(file_->path(), ": tensor ", Printable(name), " got ",
                                                   entry.written_bytes + size, " bytes, its shape takes ",
                                                   entry.tensor.size_bytes));
  }
  RETURN_IF_ERROR(file_->WriteAt(data_start_ + entry.tensor.offset + entry.written_bytes, bytes));
  entry.written_bytes += size;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  for (const auto& [name, entry] : entries_) {
    if (entry.written_bytes != entry.tensor.size_bytes) {
      return absl::FailedPreconditionError(absl::StrCat(file_->path(), ": tensor ", Printable(name), " got ",
                                                        entry.written_bytes, " bytes, its shape takes ",
                                                        entry.tensor.size_bytes));
    }
  }
  return file_->Commit();
}

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::Open(const std::string& path) {
  std::unique_ptr<SafetensorsReader> reader(new SafetensorsReader);
  ASSIGN_OR_RETURN(reader->file_, MappedFile::Open(path));
  const auto fault = [&](const auto&... parts) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", absl::StrCat(parts...)));
  };
  const absl::string_view bytes = reader->file_->bytes();
  if (bytes.size() < 8) return fault("has ", bytes.size(), " bytes, a safetensors file at least 10");
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < 8; ++i) header_bytes |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return fault("says that its header has ", header_bytes, " bytes, the limit is ", kMaxHeaderBytes,
                 "; it is no safetensors file");
  }
  if (header_bytes > bytes.size() - 8) {
    return fault("says that its header has ", header_bytes, " bytes, but the file has ", bytes.size(),
                 "; it is cut off");
  }
  const absl::string_view header = bytes.substr(8, header_bytes);
  if (header.empty() || header[0] != '{') return fault("its header does not start with {");
  HeaderParser parser;
  if (!nlohmann::json::sax_parse(header.begin(), header.end(), &parser) || !parser.fault.empty()) {
    return fault(parser.fault);
  }
  reader->data_start_ = static_cast<int64_t>(8 + header_bytes);
  reader->metadata_ = std::move(parser.metadata);
  reader->tensors_ = std::move(parser.tensors);
  std::stable_sort(reader->tensors_.begin(), reader->tensors_.end(),
                   [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
                     return a.offset != b.offset ? a.offset < b.offset : a.size_bytes < b.size_bytes;
                   });
  int64_t end = 0;
  for (size_t i = 0; i < reader->tensors_.size(); ++i) {
    const SafetensorsTensor& tensor = reader->tensors_[i];
    if (tensor.offset != end) {
      return fault("tensor ", Printable(tensor.name), " starts at byte ", tensor.offset, " of the data, ", end,
                   " expected: ", tensor.offset < end ? "it overlaps another" : "there is a hole before it");
    }
    end += tensor.size_bytes;
    reader->by_name_[tensor.name] = static_cast<int64_t>(i);
  }
  const int64_t data_bytes = static_cast<int64_t>(bytes.size()) - reader->data_start_;
  if (end != data_bytes) {
    return fault("has ", data_bytes, " bytes of data, its tensors take ", end,
                 data_bytes < end ? "; it is cut off" : "; the rest is unknown");
  }
  return reader;
}

const SafetensorsTensor* SafetensorsReader::Find(absl::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[static_cast<size_t>(found->second)];
}

absl::string_view SafetensorsReader::Bytes(const SafetensorsTensor& tensor) const {
  return file_->bytes().substr(static_cast<size_t>(data_start_ + tensor.offset),
                               static_cast<size_t>(tensor.size_bytes));
}

}  // namespace mt
