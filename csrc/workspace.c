/* workspace.c - cuts the caller's workspace into 64-byte aligned pieces; the same code counts and hands out. */
#include "internal.h"

#define ALIGNMENT 64

pnn_arena pnn_arena_make(void *workspace) {
  pnn_arena arena = {.base = NULL, .used = 0, .overflow = false};
  if (workspace) {
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
