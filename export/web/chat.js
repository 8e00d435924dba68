// The page: words in two languages, the conversation, and the buttons. What the model does is in model.js.
import { Model, download } from "./model.js";

const WORDS = {
  zh: {
    other: "English", send: "发送", stop: "停止", anew: "新对话", settings: "设置", question: "你的问题",
    hint: "说点什么……（回车发送，Shift+回车换行）", temperature: "温度", length: "回答最多多少 token",
    about: (m) => `${m.parameters} 参数，${m.stage}。模型在你的设备上运行：你写的内容不会离开本机。小模型常常说错，不要当作事实。`,
    loading: (share) => `正在加载模型……${share}%`, starting: "正在启动模型……", ready: "可以聊了",
    speed: (n, s) => `${n} 个 token，每秒 ${s} 个`, thinking: "思考过程", stopped: "已停止",
    shortened: "对话太长，最早的几轮不再读入", tooLong: "这个问题太长，模型读不下", failed: (e) => `出错了：${e}`,
    stages: { full_sft: "对话模型", lora: "对话模型（低秩适配器）", dpo: "对话模型（偏好对齐）", full_dist: "对话模型（蒸馏）",
              reason: "先思考再回答的模型", grpo: "推理模型（强化学习）" }, model: "语言模型",
  },
  en: {
    other: "中文", send: "Send", stop: "Stop", anew: "New chat", settings: "Settings", question: "Your question",
    hint: "Say something … (Enter sends, Shift+Enter for a new line)", temperature: "Temperature",
    length: "Tokens of an answer, at most",
    about: (m) => `${m.parameters} parameters, ${m.stage}. The model runs on your own device: what you write does not ` +
      "leave it. Models of this size are often wrong; do not rely on what they say.",
    loading: (share) => `Loading the model … ${share}%`, starting: "Starting the model …", ready: "Ready",
    speed: (n, s) => `${n} tokens, ${s} a second`, thinking: "Thinking", stopped: "stopped",
    shortened: "the conversation is too long: its first turns are no longer read",
    tooLong: "This question is too long for the model", failed: (e) => `It failed: ${e}`,
    stages: { full_sft: "a chat model", lora: "a chat model with an adapter", dpo: "a chat model, trained on preferences",
              full_dist: "a chat model, distilled", reason: "a model that thinks before it answers",
              grpo: "a reasoning model, trained by reinforcement" }, model: "a language model",
  },
};
const $ = (id) => document.getElementById(id);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
let about = null; // model.json
let messages = []; // [{role, content}], whole turns
let running = null; // AbortController of the answer that is being written
let status = () => "";

// --------------------------------------------------------------------------------------------------------- words
function translate() {
  const words = WORDS[language];
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-says]")) element.textContent = words[element.dataset.says];
  $("language").textContent = words.other;
  $("language").lang = language === "zh" ? "en" : "zh";
  $("question").placeholder = words.hint;
  if (about) {
    const millions = about.parameters / 1e6;
    const parameters = `${millions.toFixed(millions < 10 ? 1 : 0)}M`;
    $("name").textContent = document.title = about.name;
    $("about").textContent = words.about({ parameters, stage: words.stages[about.stage] ?? words.model });
  }
  $("status").textContent = status(words);
}

function say(what) {
  status = what;
  $("status").textContent = what(WORDS[language]);
}

// -------------------------------------------------------------------------------------------------- conversation
function bubble(role) {
  const element = document.createElement("div");
  element.className = `said ${role}`;
  $("talk").append(element);
  return element;
}

/** Shows an answer, which may begin with <think>...</think>. It is text, whatever it spells, and never HTML. */
function show(element, text) {
  const { thought, answer } = parts(text);
  element.replaceChildren();
  if (thought !== null) {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = WORDS[language].thinking;
    details.open = !answer;
    details.append(summary, thought);
    element.append(details);
  }
  element.append(answer);
}

function parts(text) {
  const found = /^\s*<think>([^]*?)(?:<\/think>|$)\s*([^]*)$/u.exec(text);
  return found ? { thought: found[1].trim(), answer: found[2] } : { thought: null, answer: text };
}

/** The prompt's ids; whole exchanges are left out at the front until the answer has room. */
async function fitting(model, talk, maxTokens) {
  let ids = await model.render(talk);
  let shortened = false;
  while (ids.length + maxTokens > model.context && talk.length > 2) {
    talk = talk.slice(2);
    shortened = true;
    ids = await model.render(talk);
  }
  return { ids, shortened };
}

async function reply(model) {
  const maxTokens = Math.min(Number($("length").value) || 512, model.context / 2);
  const { ids, shortened } = await fitting(model, messages, maxTokens);
  if (ids.length >= model.context) {
    messages.pop();
    return say((words) => words.tooLong);
  }
  const element = bubble("assistant");
  element.setAttribute("aria-busy", "true"); // a screen reader waits for the whole answer
  const options = { temperature: Number($("temperature").value), maxTokens, signal: running.signal };
  let text = "";
  let tokens = 0;
  const begin = performance.now();
  for await (const piece of model.answer(ids, options)) {
    const follow = innerHeight + scrollY > document.body.scrollHeight - 80; // unless the reader has scrolled up
    text += piece;
    tokens++;
    show(element, text);
    if (follow) scrollTo(0, document.body.scrollHeight);
  }
  const speed = Math.round((1000 * --tokens) / (performance.now() - begin)); // the last piece is no token
  element.removeAttribute("aria-busy");
  messages.push({ role: "assistant", content: parts(text).answer });
  const stopped = running.signal.aborted;
  say((words) => [words.speed(tokens, speed), ...(stopped ? [words.stopped] : []),
                  ...(shortened ? [words.shortened] : [])].join(" · "));
}

async function send(event) {
  event?.preventDefault();
  const question = $("question").value;
  if (!question.trim() || running || $("send").disabled) return;
  running = new AbortController();
  $("question").value = "";
  $("send").hidden = !($("stop").hidden = false);
  $("anew").disabled = true;
  bubble("user").textContent = question;
  scrollTo(0, document.body.scrollHeight);
  messages.push({ role: "user", content: question });
  try {
    await reply(await model);
  } catch (error) {
    messages.pop();
    document.querySelector("[aria-busy]")?.remove();
    say((words) => words.failed(error.message));
  } finally {
    running = null;
    $("send").hidden = !($("stop").hidden = true);
    $("anew").disabled = false;
    $("question").focus();
  }
}

function begin() {
  messages = [];
  $("talk").replaceChildren();
  say((words) => words.ready);
}

// -------------------------------------------------------------------------------------------------------- loading
/** Lets the service worker keep the site. Where there is none, or it does not come, the page works without. */
async function keep() {
  if (!navigator.serviceWorker) return;
  const taken = new Promise((done) => navigator.serviceWorker.addEventListener("controllerchange", done));
  await navigator.serviceWorker.register("sw.js");
  const wait = new Promise((done) => setTimeout(done, 5000));
  if (!navigator.serviceWorker.controller) await Promise.race([taken, wait]);
}

async function open() {
  about = await (await fetch("model.json")).json();
  translate();
  await keep().catch((error) => console.warn(error));
  const gguf = await download(about.file, about.bytes, (share) => {
    $("loading").value = share;
    say((words) => words.loading(Math.floor(100 * share)));
  });
  say((words) => words.starting);
  const opened = await Model.open(gguf, about);
  $("loading").hidden = true;
  $("send").disabled = false;
  say((words) => words.ready);
  return opened;
}

$("form").addEventListener("submit", send);
$("stop").addEventListener("click", () => running?.abort());
$("anew").addEventListener("click", begin);
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  translate();
});
$("question").addEventListener("keydown", (event) => {
  // While an input method composes, Enter takes its word and does not send.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
translate();
export const model = open();
model.catch((error) => say((words) => words.failed(error.message)));
