// PTX text as words.
#pragma once

#include <string>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  int line;
};

// Words (with their dots, %, $ and ::), strings in quotes, single characters; without comments.
std::vector<Token> tokens_of(const std::string& text);

// The parts between dots: "ld.global.u32" has three.
std::vector<std::string> split(const std::string& word);
std::string join(const std::vector<std::string>& parts);

// The width in bits of a type, 1 of pred, 0 where it is none.
int bits_of(const std::string& type);

}  // namespace ptx
