"""The offline default: bundled digits, a small real Mimi, and the code that trained it."""
