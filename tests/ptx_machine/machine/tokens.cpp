#include "tokens.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

namespace ptx {

std::vector<Token> tokens_of(const std::string& text) {
  const auto is_space = [](char c) { return c == '\0' || std::isspace(static_cast<unsigned char>(c)); };
  std::vector<Token> tokens;
  int line = 1;
  size_t at = 0;
  // Where the word that starts at `at` ends.
  const auto end_of_word = [&] {
    size_t end = at;
    while (end < text.size()) {
      if (text.compare(end, 2, "::") == 0) {
        end += 2;
      } else if (std::isalnum(static_cast<unsigned char>(text[end])) || std::strchr("_$.%", text[end])) {
        ++end;
      } else {
        break;
      }
    }
    return end;
  };
  while (at < text.size()) {
    size_t end = at + 1;
    bool is_token = false;
    if (is_space(text[at])) {
    } else if (text.compare(at, 2, "//") == 0) {
      end = std::min(text.find('\n', at), text.size());
    } else if (text.compare(at, 2, "/*") == 0) {
      end = std::min(text.find("*/", at + 2), text.size() - 2) + 2;
    } else if (text[at] == '"') {
      end = std::min(text.find('"', at + 1), text.size() - 1) + 1;
      is_token = true;
    } else {
      end = std::max(end_of_word(), at + 1);
      is_token = true;
    }
    if (is_token) tokens.push_back({text.substr(at, end - at), line});
    line += static_cast<int>(std::count(text.begin() + static_cast<std::ptrdiff_t>(at),
                                        text.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
    at = end;
  }
  return tokens;
}

std::vector<std::string> split(const std::string& word) {
  std::vector<std::string> parts(1);
  for (const char c : word) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string join(const std::vector<std::string>& parts) {
  std::string word;
  for (const std::string& part : parts) word += (word.empty() ? "" : ".") + part;
  return word;
}

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "bf16") return 16;
  if (type == "f16x2" || type == "bf16x2" || type == "tf32") return 32;
  for (const char* known : {"8", "16", "32", "64"}) {
    if (type.size() > 1 && std::strchr("busf", type[0]) && type.substr(1) == known && type != "f8") {
      return std::atoi(known);
    }
  }
  return 0;
}

}  // namespace ptx
