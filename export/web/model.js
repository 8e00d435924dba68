// The model on the reader's own machine: a conversation as token ids, and an answer token by token.
import { LoggerWithoutDebug, Wllama } from "./wllama.js";

const WASM = { "single-thread/wllama.wasm": "wllama-single.wasm", "multi-thread/wllama.wasm": "wllama-multi.wasm" };
// What Python's strip() takes off: JavaScript's trim() differs in a few characters.
const BLANK = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const BLANKS = new RegExp(`^${BLANK}|${BLANK}$`, "gu");
// The place before the last character of a tag.
const IN_TAG = /(?<=<\/?(?:think|answer|tool_call|tool_response))(?=>)/u;

/** The file at `url` as a Blob; progress(share) is told how much has come. */
export async function download(url, bytes, progress) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  const parts = [];
  let come = 0;
  const reader = response.body.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    parts.push(value);
    come += value.length;
    progress(Math.min(come / bytes, 1));
  }
  return new Blob(parts);
}

export class Model {
  held = []; // the tokens whose keys and values are in the cache

  /**
   * gguf: a Blob. context: positions, of prompt and answer together. start, end: the ids of a turn's markers.
   * special: the ids of all markers, which are not shown.
   */
  static async open(gguf, { context, start, end, special }) {
    const model = Object.assign(new Model(), { context, start, end, special });
    model.wllama = new Wllama(WASM, { suppressNativeLog: true, logger: LoggerWithoutDebug });
    // Several threads share memory, which browsers allow only where the host sends isolation headers.
    const threads = globalThis.crossOriginIsolated ? {} : { n_threads: 1 };
    const exact = { cache_type_k: "f32", cache_type_v: "f32" };
    await model.wllama.loadModel([gguf], { n_ctx: context, ...exact, ...threads });
    return model;
  }

  /**
   * messages: [{role, content}] -> token ids, up to where the assistant begins to speak.
   *
   * Markers are put in as ids, so a text that spells one stays text: nobody can type the end of their own turn.
   */
  async render(messages) {
    const ids = [];
    for (const { role, content } of messages) {
      ids.push(this.start);
      if (role === "assistant") {
        ids.push(...(await this.encode("assistant\n")), ...(await this.encode(content.replace(BLANKS, ""), true)));
      } else {
        ids.push(...(await this.encode(`${role}\n${content}`)));
      }
      ids.push(this.end, ...(await this.encode("\n")));
    }
    ids.push(this.start, ...(await this.encode("assistant\n")));
    return ids;
  }

  /** The ids of a text. llama.cpp takes <think> and the like for tokens wherever they stand; for us only `tags` are. */
  async encode(text, tags = false) {
    const ids = [];
    // A tag that is cut before its ">" is text. The vocabulary cuts there anyway, so nothing else changes.
    for (const part of tags ? [text] : text.split(IN_TAG)) {
      if (part) ids.push(...(await this.wllama.tokenize(part, false)));
    }
    return ids;
  }

  /** Yields the answer in pieces of text. temperature 0: always the best token. signal: aborted, it ends at once. */
  async *answer(ids, { temperature = 0.85, topP = 0.85, maxTokens = 512, signal } = {}) {
    // Turns that were read before are still in the cache. The last token is always read anew: it gives the logits.
    let same = 0;
    while (same < Math.min(this.held.length, ids.length - 1) && this.held[same] === ids[same]) same++;
    await (same ? this.wllama.kvRemove(same, -1) : this.wllama.kvClear());
    this.held.length = same;
    await this.wllama.samplingInit({ temp: temperature, top_p: topP, top_k: 0, min_p: 0, penalty_repeat: 1 });
    await this.read(ids.slice(same));
    const text = new TextDecoder(); // keeps the bytes of half a character until the rest has come
    for (let left = Math.min(maxTokens, this.context - ids.length); left > 0; left--) {
      const { token, piece } = await this.wllama.samplingSample();
      if (signal?.aborted || this.wllama.isTokenEOG(token) || token === this.end) break;
      yield this.special.includes(token) ? "" : text.decode(piece, { stream: true });
      await this.wllama.samplingAccept([token]);
      if (left > 1) await this.read([token]);
    }
    yield text.decode();
  }

  async read(ids) {
    await this.wllama.decode(ids, {});
    this.held.push(...ids);
  }
}
