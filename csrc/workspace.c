/* workspace.c - cuts the caller's workspace into 64-byte aligned pieces; the same code counts and hands out. */
#include "internal.h"

#define ALIGNMENT 64

pnn_arena pnn_arena_make(void *workspace, size_t room) {
  pnn_arena arena = {.base = NULL, .used = 0, .room = 0, .overflow = false};
  if (workspace) {
    arena.room = room;
    const uintptr_t address = (uintptr_t)workspace;
    arena.base = (char *)workspace + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
  }
  return arena;
}

void *pnn_arena_take(pnn_arena *arena, int64_t count, int64_t element) {
  size_t bytes, used;
  if (__builtin_mul_overflow(count, element, &bytes) || __builtin_add_overflow(bytes, ALIGNMENT - 1, &bytes) ||
      __builtin_add_overflow(arena->used, bytes / ALIGNMENT * ALIGNMENT, &used) || used > PTRDIFF_MAX / 2) {
    arena->overflow = true;
    return NULL;
  }
  void *piece = arena->base ? arena->base + arena->used : NULL;
  arena->used = used;
  return piece;
}

size_t pnn_arena_bytes(const pnn_arena *arena) { return arena->used ? arena->used + ALIGNMENT - 1 : 0; }

bool pnn_arena_fits(const pnn_arena *arena) { return !arena->overflow && pnn_arena_bytes(arena) <= arena->room; }

pnn_status pnn_arena_check(const pnn_arena *arena, const pnn_params *params, const char *ask, pnn_error *error) {
  const size_t bytes = pnn_arena_bytes(arena);
  PNN_FAIL_IF(bytes && !params->workspace, error, PNN_ERROR_NULL,
              "workspace is NULL, it should point to %zu bytes: ask %s", bytes, ask);
  PNN_FAIL_IF(bytes > params->workspace_bytes, error, PNN_ERROR_WORKSPACE,
              "workspace_bytes is %zu, it should be at least %zu: ask %s", params->workspace_bytes, bytes, ask);
  return PNN_OK;
}
