# Writes <build>/generated/torch_pnn_schemas.h from python/torch_pnn/schemas.txt, the one place that holds the
# operators' schemas: Python reads the text file, C++ this header. Sets PNN_GENERATED_DIR.

set(PNN_GENERATED_DIR ${PROJECT_BINARY_DIR}/generated)
set(schema_file ${PROJECT_SOURCE_DIR}/python/torch_pnn/schemas.txt)
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${schema_file})

file(STRINGS ${schema_file} schema_lines)
set(schema_constants "")
set(schema_names "")
foreach(line IN LISTS schema_lines)
  if(line MATCHES "^#" OR line STREQUAL "")
    continue()
  endif()
  if(NOT line MATCHES "^([a-z0-9_]+)\\(.*\\) -> ")
    message(FATAL_ERROR "${schema_file}: not an operator schema: ${line}")
  endif()
  # _perturb_conv2d_backward becomes kPerturbConv2dBackward.
  string(REGEX MATCHALL "[a-z0-9]+" words "${CMAKE_MATCH_1}")
  set(name k)
  foreach(word IN LISTS words)
    string(SUBSTRING ${word} 0 1 first)
    string(SUBSTRING ${word} 1 -1 rest)
    string(TOUPPER ${first} first)
    string(APPEND name ${first}${rest})
  endforeach()
  string(APPEND schema_constants "inline constexpr const char* ${name} = R\"schema(${line})schema\";\n")
  string(APPEND schema_names "${name}, ")
endforeach()
string(REGEX REPLACE ", $" "" schema_names "${schema_names}")

file(CONFIGURE OUTPUT ${PNN_GENERATED_DIR}/torch_pnn_schemas.h @ONLY CONTENT
[=[// torch_pnn_schemas.h - the operators' schemas. Written by cmake/schemas.cmake from python/torch_pnn/schemas.txt.
#ifndef TORCH_PNN_SCHEMAS_H
#define TORCH_PNN_SCHEMAS_H

namespace torch_pnn::schemas {

@schema_constants@
inline constexpr const char* kSchemas[] = {@schema_names@};

}  // namespace torch_pnn::schemas

#endif
]=])
