// Keeps the site in the browser, so that it opens without a network after the first time. The names are filled in by
// the export; VERSION changes with any of the files.
const VERSION = "@VERSION@";
const FILES = @FILES@;
const MINE = `chat ${self.registration.scope} `; // other sites on the same host keep their own
const CACHE = MINE + VERSION;

self.addEventListener("install", (event) => {
  self.skipWaiting();
  const fresh = FILES.map((file) => new Request(file, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(fresh)));
});

self.addEventListener("activate", (event) => {
  const tidy = async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith(MINE) && name !== CACHE) await caches.delete(name);
    }
    await self.clients.claim(); // the first visit's page too, so that the model it loads is kept
  };
  event.waitUntil(tidy());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(self.registration.scope)) return;
  const answer = async () => {
    const cache = await caches.open(CACHE);
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    const response = await fetch(request);
    if (response.status === 200) {
      const copy = response.clone();
      event.waitUntil(cache.put(request, copy).catch(() => {})); // a full disk: the page works, but not offline
    }
    return response;
  };
  event.respondWith(answer());
});
