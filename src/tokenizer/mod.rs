//! Text to token ids and back, exactly as the checkpoint's own `tokenizer.json` says; and the chat template.

pub mod chat;
