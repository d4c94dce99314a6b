/* error.c - statuses, their names, and the sentence that goes with a failure. */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

#define PNN_TEXT_(x) #x
#define PNN_TEXT(x) PNN_TEXT_(x)

const char *pnn_version(void) {
  return PNN_TEXT(PNN_VERSION_MAJOR) "." PNN_TEXT(PNN_VERSION_MINOR) "." PNN_TEXT(PNN_VERSION_PATCH);
}

const char *pnn_status_string(pnn_status status) {
  switch (status) {
    case PNN_OK: return "PNN_OK";
    case PNN_ERROR_NULL: return "PNN_ERROR_NULL";
    case PNN_ERROR_VERSION: return "PNN_ERROR_VERSION";
    case PNN_ERROR_SHAPE: return "PNN_ERROR_SHAPE";
    case PNN_ERROR_DTYPE: return "PNN_ERROR_DTYPE";
    case PNN_ERROR_VALUE: return "PNN_ERROR_VALUE";
    case PNN_ERROR_OVERFLOW: return "PNN_ERROR_OVERFLOW";
    case PNN_ERROR_ALIAS: return "PNN_ERROR_ALIAS";
    case PNN_ERROR_WORKSPACE: return "PNN_ERROR_WORKSPACE";
    case PNN_ERROR_UNSUPPORTED: return "PNN_ERROR_UNSUPPORTED";
    case PNN_ERROR_DEVICE: return "PNN_ERROR_DEVICE";
  }
  return "unknown status";
}

pnn_status pnn_fail(pnn_error *error, pnn_status status, const char *format, ...) {
  if (error) {
    va_list arguments;
    va_start(arguments, format);
    error->status = status;
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
  }
  return status;
}

pnn_status pnn_succeed(pnn_error *error) {
  if (error) {
    error->status = PNN_OK;
    error->message[0] = '\0';
  }
  return PNN_OK;
}
