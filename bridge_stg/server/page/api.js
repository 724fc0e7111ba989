// Talks with the server: requests with the API key, waiting where it is busy, uploads with progress, server-sent events.

const KEY = "bridge-stg-key";
const BUSY_TRIES = 20;
const RECONNECTIONS = 6;

/** An error of the server, in its words. `status` is 0 where it could not be reached at all. */
export class ServerError extends Error {
  constructor(status, code, message, waitS = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.waitS = waitS;
  }
}

export class Api {
  /** @param {(wrong: boolean) => Promise<string|null>} askKey requests a key from the user; null: no key was given. */
  constructor(askKey) {
    this.askKey = askKey;
    this.requestingKey = null;
    /** Called where there is another key. @type {(() => void)|null} */
    this.onKey = null;
  }

  get key() {
    return sessionStorage.getItem(KEY);
  }

  /**
   * Send a request and return its response, which is a good one.
   *
   * @param {{method?: string, json?: any, signal?: AbortSignal, onWait?: (seconds: number) => void, quiet?: boolean}}
   *   options `onWait` gets the seconds that a busy server requests to wait; `quiet`: request no key, do not wait.
   */
  async request(path, { method = "GET", json, signal, onWait, quiet = false } = {}) {
    const body = json === undefined ? undefined : JSON.stringify(json);
    const type = body === undefined ? {} : { "Content-Type": "application/json" };
    return this.#persist(quiet, signal, onWait, async () => {
      let response;
      try {
        response = await fetch(path, { method, body, signal, headers: { ...type, ...this.#authorization() } });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw unreachable();
      }
      if (!response.ok) throw errorOf(response.status, response.headers, await response.text());
      return response;
    });
  }

  /** The same, and return the answer's JSON. */
  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  /** Send a file and return the server's record of it. @param {(part: number) => void} onProgress 0 … 1. */
  async upload(file, { signal, onProgress, onWait }) {
    return this.#persist(false, signal, onWait, () => new Promise((resolve, reject) => {
      const form = new FormData();
      form.append("file", file, file.name);
      const sending = new XMLHttpRequest();
      sending.open("POST", "v1/videos");
      for (const [name, value] of Object.entries(this.#authorization())) sending.setRequestHeader(name, value);
      sending.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
      sending.onerror = () => reject(unreachable());
      sending.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      sending.onload = () => {
        const headers = { get: (name) => sending.getResponseHeader(name) };
        if (sending.status < 200 || sending.status > 299) {
          reject(errorOf(sending.status, headers, sending.responseText));
        } else {
          resolve(JSON.parse(sending.responseText));
        }
      };
      signal?.addEventListener("abort", () => sending.abort(), { once: true });
      sending.send(form);
    }));
  }

  /**
   * Yield server-sent events as {event, data}; comes back where the connection is lost.
   *
   * @param {(event: string) => boolean} isLast whether nothing follows this event.
   */
  async *events(path, { signal, isLast, onWait }) {
    for (let lost = 0; ; ) {
      try {
        const response = await this.request(path, { signal, onWait });
        for await (const message of readEvents(response.body)) {
          lost = 0;
          yield message;
          if (isLast(message.event)) return;
        }
      } catch (error) {
        if (error.name === "AbortError" || (error instanceof ServerError && error.status !== 0)) throw error;
      }
      lost += 1;
      if (lost > RECONNECTIONS) throw unreachable();
      await sleep(Math.min(8, 2 ** (lost - 1)) * 500, signal);
    }
  }

  /** Send a request that outlives the page and whose answer nobody waits for. */
  forget(path) {
    fetch(path, { method: "DELETE", keepalive: true, headers: this.#authorization() }).catch(() => {});
  }

  #authorization() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  /** Try until the server accepts it: request a key if it needs one, wait if it is busy. */
  async #persist(quiet, signal, onWait, attempt) {
    for (let busy = 0; ; ) {
      const used = this.key;
      try {
        return await attempt();
      } catch (error) {
        if (quiet || !(error instanceof ServerError)) throw error;
        if (error.status === 401 && (this.key !== used || (await this.#getKey(used !== null)))) continue;
        const again = error.status === 429 || (error.status === 503 && error.waitS !== null);
        if (!again || ++busy > BUSY_TRIES) throw error;
        for (let left = Math.ceil(error.waitS ?? Math.min(30, 2 ** busy)); left > 0; left -= 1) {
          onWait?.(left);
          await sleep(1000, signal);
        }
        onWait?.(0);
      }
    }
  }

  /** Request a key once for all callers. Return whether there is one now. */
  async #getKey(wrong) {
    this.requestingKey ??= this.askKey(wrong).finally(() => (this.requestingKey = null));
    const key = await this.requestingKey;
    if (key && key !== this.key) {
      sessionStorage.setItem(KEY, key);
      this.onKey?.();
    }
    return Boolean(key);
  }
}

/** Yield {event, data} of a stream of server-sent events; `data` is parsed as JSON. */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest = (rest + value).replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const message = readEvent(block);
        if (message) yield message;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
  return data.length > 0 ? { event, data: JSON.parse(data.join("\n")) } : null;
}

/** Wait; an aborted signal ends it with the error that fetch would raise. */
export function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException("cancelled", "AbortError"));
    if (signal?.aborted) return stop();
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); stop(); }, { once: true });
  });
}

function errorOf(status, headers, text) {
  let [code, message] = ["", ""];
  try {
    const body = JSON.parse(text);
    code = String(body.code ?? "");
    message = String(body.error ?? (typeof body.detail === "string" ? body.detail : ""));
  } catch {
    message = "";
  }
  const wait = Number.parseFloat(headers.get("Retry-After"));
  return new ServerError(status, code, message || `The server answered with status ${status}.`, wait >= 0 ? wait : null);
}

function unreachable() {
  return new ServerError(0, "unreachable", "There is no answer. Is the server still running, and the network there?");
}
